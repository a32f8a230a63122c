# make demo   create a virtual environment, build engines of the small trained checkpoint, write out/demo.mp4
# make test   check style, documentation and types, run the tests, require the coverage of CI
# make soak   run the tests that repeat something many times or for a long time
# All need only a fresh clone and Python 3.10 or newer. `make demo PYTHON=python3.12` selects another Python.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

# Without an NVIDIA driver, the CPU wheel of PyTorch saves gigabytes. If its index cannot be reached, PyPI's wheel is used.
ifeq ($(shell command -v nvidia-smi),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

# Tests run with one thread per process. Freed memory is kept for the next tensor, because requesting it from the system
# takes a fifth of the time of tests on a CPU. (Tests that measure memory set these variables themselves.)
ALONE := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824

.PHONY: demo test lint types unit soak clean

demo: $(READY)
	$(BIN)/scail2-rt demo -o out

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(ALONE) $(BIN)/python -m tests.support.warm_graphs
	$(ALONE) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not soak" --durations=25 \
		--cov --cov-report=term --cov-fail-under=90

soak: $(READY)
	$(ALONE) $(BIN)/python -m pytest -m soak -rP

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "error: Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --no-deps --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 1 --timeout 15) torch
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv out build .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache
