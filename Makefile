# make demo and make test are all that a fresh machine needs: Python 3.11 or newer, make, a C compiler.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-long lint docs bench clean

help:
	@echo "make demo       set up and show what the model does"
	@echo "make test       set up and run the linters, the type checker, the tests and the documentation build"
	@echo "make test-long  fuzzing and benchmark smoke, fresh-environment installs"
	@echo "make lint docs bench clean"

demo: .venv/demo-stamp
	$(BIN)/sevlab demo

test: lint .venv/dev-stamp
	$(BIN)/python -m pytest -n 2 -q
	@$(MAKE) --no-print-directory docs

test-long: .venv/dev-stamp
	$(BIN)/python -m pytest -n 2 -q -m long
	$(BIN)/python -m tests.bench --quick

lint: .venv/dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typing/api.py
	PYTHONPATH=.editable $(BIN)/lint-imports --no-cache

docs: .venv/dev-stamp
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

bench: .venv/dev-stamp
	$(BIN)/python -m tests.bench

clean:
	git clean -fdX  # only what .gitignore names: new work that is not yet committed stays

.venv/python-stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sevlab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo-stamp: .venv/python-stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev-stamp: .venv/python-stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo-stamp
