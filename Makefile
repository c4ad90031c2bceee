# `make train` and `make test` need python3, pip and a C compiler; all else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

# What the project itself is worked on with: the newest torch of which pip takes the CPU build by itself. Later ones are
# supported too (`make matrix`), and bring gigabytes of CUDA.
TORCH ?= torch<2.14

.PHONY: train test lint types layers pytest processors matrix test-browser strangers slow bench fuzz sanitize clean

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
	$(BIN)/pytest -n 2 -m "not slow and not browser and not strangers"

# What knows the processor, as on others: torch's kernels and the emitted C for older ones, one thread and two; and what
# a memory budget promises, since how much room a product takes depends on them.
KERNELS := -n 2 tests/test_native_operations.py tests/test_plan.py
PROMISES := tests/test_checkpointed.py -k "not checkpointed or promise or budget"
processors: .venv/.installed-test
	ATEN_CPU_CAPABILITY=default UNROLLED_CFLAGS=-march=x86-64-v2 \
	$(BIN)/pytest $(KERNELS) tests/test_more_cells.py $(PROMISES)
	ATEN_CPU_CAPABILITY=avx2 UNROLLED_CFLAGS=-march=x86-64-v3 UNROLLED_THREADS=2 \
	$(BIN)/pytest $(KERNELS) $(PROMISES)
	! grep -qw avx512f /proc/cpuinfo || UNROLLED_CFLAGS=-march=x86-64-v4 UNROLLED_THREADS=2 $(BIN)/pytest $(KERNELS)

# The whole suite on the oldest and on the newest torch that are supported, each in an environment of its own.
matrix: matrix-2.10.0 matrix-2.14.1
matrix-%:
	$(PYTHON) -m venv build/torch-$*
	build/torch-$*/bin/python -m pip install --quiet 'torch==$*' -e '.[test]'
	build/torch-$*/bin/pytest -n 2 -m "not slow and not browser and not strangers"

# The page in Debian's chromium; screenshots are left in build/screenshots.
test-browser: .venv/.installed-test
	$(BIN)/pytest -m browser tests/browser

# Other libraries' own cells. What the libraries warn of is theirs.
strangers: .venv/.installed-strangers
	$(BIN)/pytest -W ignore -n 2 -m strangers tests/strangers

slow: .venv/.installed-test
	$(BIN)/pytest -m slow

bench: .venv/.installed-test
	$(BIN)/python -m benchmarks

# 5,000 random cells for each engine, with the flags that users' loops are built with: half an hour of one core, most of
# it the compiler's; and 20,000 values set anew around cells. A failing cell is printed as a recipe that `random_cells.assert_recipe_as_reference` takes.
fuzz: .venv/.installed-test
	UNROLLED_FUZZ=5000 $(BIN)/pytest -n 2 tests/test_random_cells.py
	UNROLLED_MUTATIONS=20000 $(BIN)/pytest -n 2 tests/test_mutations.py

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
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[draw]'
	touch $@

.venv/.installed-test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[test]'
	touch $@ .venv/.installed

.venv/.installed-strangers: .venv/.installed-test tests/strangers/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r tests/strangers/requirements.txt
	touch $@
