# One command each for what this repository is for; `make` alone lists them.
# Every target but gpu makes the virtual environment .venv on first use, and makes it anew when
# what was installed has changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tests and benchmarks share their cores with other processes: a spinning OpenMP thread costs a
# whole time slice there, a sleeping one does not.
RUN    := OMP_WAIT_POLICY=passive
# Two workers: most tests are Python and small kernels, which leave a second core idle.
PYTEST := $(RUN) $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
NATIVE  = $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format gpu docs clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

# One CUDA architecture, with code that newer devices translate: four take minutes to build.
# Byte code is made when a module is first imported: making it ahead for all of torch takes most of
# a minute.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "pyeff needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt \
		--config-settings=cmake.define.PYEFF_CUDA_ARCHITECTURES=80 --editable '.[dev]'
	touch $@

demo: $(STAMP) ## Train a nested network on digits, compare its levels, write demo_out/report.html
	$(RUN) $(BIN)/pyeff demo --out demo_out

test: $(STAMP) ## Run every test that needs no GPU, in the processes they need
	$(PYTEST) tests --ignore=tests/triton --ignore=tests/simt
	$(PYTEST) --dist loadfile tests/simt
	$(PYTEST) tests/triton/interpreter
	$(PYTEST) tests/triton/aot

bench: $(STAMP) ## Measure the operators against what else a user could run; writes docs/results
	set -e; for script in benchmarks/ops/bench_*.py; do \
		$(RUN) $(BIN)/python $$script --out docs/results; done

lint: $(STAMP) ## Check style, types and formatting; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(STAMP) ## Put Python and C++ into their standard form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

gpu: ## Build, test and measure on an NVIDIA machine as it is: make gpu OUT=folder
	@test -n "$(OUT)" || { echo "make gpu needs a folder for its tables: make gpu OUT=results"; exit 1; }
	$(PYTHON) benchmarks/gpu.py --out "$(OUT)"

docs: $(STAMP) ## Run every code block of the README and the guide, and check their links
	$(PYTEST) tests/docs

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist demo_out .pytest_cache .mypy_cache .ruff_cache
