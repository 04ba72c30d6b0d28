# Every task of the project; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PY := .venv/bin/python
BIN := .venv/bin

.PHONY: help setup engine checked demo up down test test-slow check format bench prove lock

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install everything into this checkout (Python 3.11+, Node.js and npm are all it needs)
	@python3 setup/setup.py

demo: setup ## the whole product in five minutes: deposit, chat, earn, settle, prove
	@exec $(BIN)/tollway demo

up: setup ## the same stack, left running; prints URLs and keys, writes var/stack.json
	@exec $(BIN)/tollway up

down: ## end what `make up` started
	@exec $(BIN)/tollway down

# The engine's installation takes as long as everything else before the tests.
engine:
	@python3 engine/build.py

checked:
	@python3 setup/setup.py --without-engine
	@$(MAKE) --no-print-directory check

test: ## every check and every test, with the real vLLM
	@$(MAKE) --no-print-directory -j 2 engine checked
	@exec $(BIN)/pytest -n 2 -m 'not slow' --durations 15

test-slow: setup ## the tests that kill and restart whole stacks and batches at every point (half an hour)
	@exec $(BIN)/pytest -m slow --durations 15

check: ## format, lint, types, import rules, tidy
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: ## let the formatter and the linter mend what they can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: ## a benchmark with its peers: make bench NAME=ledger
	@test -f bench/$(NAME).py || { echo "make bench NAME=… ; there is:"; ls bench; exit 2; }
	@exec $(PY) bench/$(NAME).py

prove: ## check every ledger invariant of the running stack, and escrow against the chains
	@exec $(BIN)/tollway prove

lock: ## pin all dependencies anew (hashes, no hosts)
	@sh requirements/lock.sh
