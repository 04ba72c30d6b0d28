# Every task of the project; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PY := .venv/bin/python
BIN := .venv/bin

.PHONY: help setup engine early demo up down test test-slow check format bench prove lock

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

# The engine's installation keeps one core busy for minutes; the other one does all that needs no engine.
# Each module of the tests is in one part (tests/conftest.py).
test: ## every check and every test, with the real vLLM
	@$(MAKE) --no-print-directory -j 2 engine early
	@exec $(BIN)/pytest -n 2 -m 'not slow' --part late --durations 15

engine:
	@python3 engine/build.py

early:
	@python3 setup/setup.py --without-engine
	@$(MAKE) --no-print-directory check
	@echo "  the tests that need no engine, into var/early.log"
	@$(BIN)/pytest -m 'not slow' --part early --durations 15 > var/early.log 2>&1; \
	    code=$$?; cat var/early.log; exit $$code

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
