# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: install quickstart test slow nightly check clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/daekit quickstart

test: install
	$(BIN)/pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

slow: $(VENV)/.deepspeed
	$(BIN)/pytest -m "slow and not nightly"

nightly: $(VENV)/.deepspeed
	$(BIN)/pytest -m nightly

$(VENV)/.deepspeed: $(INSTALLED)
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt -e '.[dev,deepspeed]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
