# The two commands: `make demo` trains a small model with three volunteers on this machine; `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test test-swarm lint check clean

demo: .venv/run.stamp
	$(BIN)/swarm-node demo

test: .venv/dev.stamp
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not swarm" --numprocesses 2 tests/unit
	$(BIN)/python -m pytest -m "not swarm" --ignore tests/unit

test-swarm: .venv/dev.stamp
	$(BIN)/python -m pytest -m "swarm and not alone" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m "swarm and alone"

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test test-swarm

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "swarm-node needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing swarm-node into .venv (a minute or two the first time)"
	$(PIP) install -c constraints.txt "torch==2.13.0"
	$(PIP) install -c constraints.txt -e ".[coordinator]"
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
