# `make train` and `make test` need python3, pip and a C compiler; all else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint types layers pytest slow bench clean

train: .venv/.installed
	$(BIN)/unrolled train

test: lint types layers pytest

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-test
	$(BIN)/mypy

layers: .venv/.installed-test
	$(BIN)/lint-imports --no-cache

pytest: .venv/.installed-test
	$(BIN)/pytest -n 2 -m "not slow"

slow: .venv/.installed-test
	$(BIN)/pytest -m slow

bench: .venv/.installed-test
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist

# A stamp is newer than pyproject.toml once its requirements are in; until that file changes nothing is installed again.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/.installed-test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ .venv/.installed
