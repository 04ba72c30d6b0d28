#!/bin/sh
# Pin every dependency by hash.  No lock file names a host: where to fetch from is the reader's setting.
set -eu
cd "$(dirname "$0")/.."
pin() { .venv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet "$@"; }
pin requirements/bootstrap.in -o requirements/bootstrap.lock
pin pyproject.toml --extra dev -o requirements/dev.lock
for extra in node marketplace; do
  pin pyproject.toml --extra "$extra" -c requirements/dev.lock -o "requirements/$extra.lock"
done
pin bench/peers.in -o requirements/peers.lock
