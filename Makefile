# `make train` and `make test` need python3, pip and a C compiler; all else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint types layers pytest test-browser slow bench fuzz sanitize clean

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
	$(BIN)/pytest -n 2 -m "not slow and not browser"

# The page in Debian's chromium; screenshots are left in build/screenshots.
test-browser: .venv/.installed-test
	$(BIN)/pytest -m browser tests/browser

slow: .venv/.installed-test
	$(BIN)/pytest -m slow

bench: .venv/.installed-test
	$(BIN)/python -m benchmarks

# 5,000 random cells for each engine, with the flags that users' loops are built with: half an hour of one core, most of
# it the compiler's. A failing cell is printed as a recipe that `random_cells.assert_recipe_as_reference` takes.
fuzz: .venv/.installed-test
	UNROLLED_FUZZ=5000 $(BIN)/pytest -n 2 tests/test_random_cells.py

# The emitted C under AddressSanitizer and UBSan; their libraries have to be there before Python is. Checks do not need
# optimised code, which takes the compiler several times as long.
SANITIZERS := $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell gcc -print-file-name=$(name)))
sanitize: .venv/.installed-test
	cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && \
	CC=gcc UNROLLED_CACHE=$$cache LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	UNROLLED_CFLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -g" \
	$(BIN)/pytest -n 2 -k native tests/test_engines.py tests/test_random_cells.py

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
