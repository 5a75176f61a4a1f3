# Each target installs what it needs: a fresh machine needs only Python 3.10+ and make.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
BIN = $(VENV)/bin
SHELL = /bin/bash
.SHELLFLAGS = -eu -o pipefail -c
# The tests start hundreds of servers. Without bytecode files, each of them would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast test-lowest soak fuzz bench lint format docs clean
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/venv.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	touch $@

$(VENV)/demo.stamp: $(VENV)/venv.stamp
	$(BIN)/python -m pip install --quiet -e ".[uvicorn]"
	touch $@

$(VENV)/fast.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --group test
	touch $@

$(VENV)/lowest.stamp: $(VENV)/venv.stamp constraints-lowest.txt
	$(BIN)/python -m pip install --quiet -e ".[uvicorn]" --group test -c constraints-lowest.txt
	touch $@

$(VENV)/test.stamp: $(VENV)/fast.stamp
	$(BIN)/python -m pip install --quiet --group servers --group suite
	touch $@

$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install --quiet --group lint
	touch $@

$(VENV)/docs.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

$(VENV)/bench.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --group servers
	touch $@

$(VENV)/fuzz.stamp: $(VENV)/fast.stamp
	$(BIN)/python -m pip install --quiet --group fuzz
	touch $@

# The peers run on the same server and framework as the library does.
$(PEERS)/peers.stamp: benchmarks/peers.txt $(VENV)/bench.stamp
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip freeze | grep -E '^(uvicorn|uvloop|websockets|h11|fastapi|starlette|pydantic)==' > $(PEERS)/same.txt
	$(PEERS)/bin/python -m pip install --quiet -r benchmarks/peers.txt -c $(PEERS)/same.txt
	touch $@

demo: $(VENV)/demo.stamp ## Start the chat example and print its address
	$(BIN)/python -m examples.chat

# Tests that measure run alone, tests with short deadlines run beside each other, and all others share the machine.
# Coverage slows the code down, so the timed tests run without it.
test: $(VENV)/test.stamp ## Run all tests on real servers, with branch coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not generated and not timed and not alone and not soak" --numprocesses 3 --dist loadfile
	$(BIN)/python -m pytest -m "generated and not soak" --numprocesses 3 --dist worksteal
	$(BIN)/python -m pytest -m "timed and not alone and not soak" --numprocesses 3 --dist loadfile
	$(BIN)/python -m pytest -m "alone and not soak"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-fast: $(VENV)/fast.stamp ## Run the tests without server processes
	$(BIN)/python -m pytest -m "not live and not soak"

test-lowest: $(VENV)/lowest.stamp ## Run the fast tests on the lowest supported versions
	$(BIN)/python -m pytest -m "not live and not soak"

soak: $(VENV)/test.stamp ## Run the long tests, and others on more servers, about 30 minutes
	$(BIN)/python -m pytest -m soak

fuzz: $(VENV)/fuzz.stamp ## Fuzz for ten minutes in total, on CPython 3.11; SECONDS=600 sets the time for each target
	$(BIN)/python -m tests.fuzz $(if $(SECONDS),--seconds $(SECONDS))

bench: $(VENV)/bench.stamp $(PEERS)/peers.stamp ## Compare the speed with the peers, about twenty minutes; ARGS=--quick for four
	$(BIN)/python -m benchmarks --peers-python $(PEERS)/bin/python $(ARGS)

lint: $(VENV)/lint.stamp ## Check format, style, types and layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/lint.stamp ## Format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/docs.stamp ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## Remove everything that the other targets created
	rm -rf .venv .venv-* site dist build .coverage .coverage.* .pytest_cache .fuzz .mypy_cache .ruff_cache .import_linter_cache
