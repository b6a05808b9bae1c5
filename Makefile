# Everything below works from a fresh clone with Python >= 3.11, git and make.
#   make demo                        preprocess, fine-tune, evaluate, relax, prune, report
#   make demo DEMO_ARGS="--short"    the same path in a fraction of the time
#   make test                        the fast tests
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .bench-venv
DEMO_ARGS ?=
BENCHMARK_ARGS ?=
PYTEST_ARGS ?=

.PHONY: help setup demo test test-quick test-slow lint package docs api benchmark

help:
	@echo "make setup       install everything into $(VENV) (the other targets do it themselves)"
	@echo "make demo        the main job on bundled OC20 data; DEMO_ARGS=\"--short\" for a quick run"
	@echo "make test        fast tests            make test-quick  one per promise, under a minute"
	@echo "make test-slow   all tests"
	@echo "make lint        ruff and mypy         make docs        the pages: links, code, numbers"
	@echo "make api         the API reference, in build/api"
	@echo "make package     build wheel and source distribution, check them, use the wheel outside the clone"
	@echo "make benchmark   speed and memory against fairchem-core; BENCHMARK_ARGS=\"--quick\" for a smoke run"

setup: $(VENV)/.setup-complete

# The stamp goes first and comes back last: a set-up that was interrupted is never taken for a finished one.
# Without --no-compile pip compiles all of torch, SymPy and SciPy, a minute of one core; a tenth is ever imported.
$(VENV)/.setup-complete: pyproject.toml constraints.txt
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $$($(PYTHON) --version) is too old; equiformer2 needs Python 3.11 or newer (make PYTHON=/path/to/python3.11)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --no-compile --no-build-isolation --constraint constraints.txt --editable '.[test,dev]'
	@$(BIN)/python -c 'import datasets_oc20, equiformer2, torch'
	@touch $@

demo: setup
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# One test per promise of the README, in one process: the files named in tests/quick.txt are all that is imported.
test-quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q @tests/quick.txt

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'slow or not slow' $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build check-wheel-contents twine
	.ci/package $(BIN)/python

docs: setup
	$(BIN)/python -m pytest tests/test_docs.py tests/docs

# Built from the docstrings; not part of continuous integration.
api: setup
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/build_api.py build/api

# The reference implementation lives in an environment of its own: it needs older NumPy and SciPy.
$(BENCH_VENV)/.complete: benchmarks/setup_reference.sh benchmarks/reference-constraints.txt
	@rm -f $@
	PYTHON="$(PYTHON)" benchmarks/setup_reference.sh $(BENCH_VENV)
	@touch $@

benchmark: setup $(BENCH_VENV)/.complete
	$(BIN)/python scripts/benchmark.py --reference-python $(BENCH_VENV)/bin/python $(BENCHMARK_ARGS)
