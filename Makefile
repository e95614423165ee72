# Everything a newcomer needs. Each target sets up what it needs by itself.
.DEFAULT_GOAL := help
.PHONY: help run test test-cluster test-faults check bench format lock clean

help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

run: ## start the relay on 127.0.0.1:8080, with its own MongoDB
	@scripts/setup run
	@exec .venv/bin/python -m relay

test: ## run the tests, against a real MongoDB
	@scripts/setup dev
	@.venv/bin/python -m pytest -m "not faults" -n 3 --dist loadfile

test-cluster: ## run those that need a database on a real sharded cluster instead
	@scripts/setup dev
	@RELAY_TEST_MONGO=cluster .venv/bin/python -m pytest tests/integration tests/contract -m "not faults" -n 2 --dist loadfile

test-faults: ## run the slow tests that kill, pause and fail real processes
	@scripts/setup dev
	@.venv/bin/python -m pytest -m faults

check: ## formatting, lint, types, import rules
	@scripts/check

bench: ## measure the relay on this machine against MongoDB's raw cycle
	@scripts/bench live

format: ## format the code
	@scripts/setup dev
	@.venv/bin/ruff format --quiet --config config/ruff.toml .
	@.venv/bin/ruff check --quiet --fix --config config/ruff.toml .

lock: ## pin the versions of config/requirements/*.in again, with hashes (needs uv)
	@scripts/lock

clean: ## remove the virtual environment and caches (not the data in var/)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
