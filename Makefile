# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing torch, sam2, timm and the rest into .venv: about three minutes the first time."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/dsu demo

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

clean:
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache
