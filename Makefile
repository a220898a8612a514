# make demo    install, then train, unlearn, attack, measure and certify on invented people; prints where the report is
# make test    install with the development tools, run the tests
# make lint    ruff and mypy          make check   lint and test          make clean   remove the environment
#
# Only Python 3.11, pip and git are assumed. On Linux, PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# takes the small CPU build of PyTorch in place of the one with CUDA.

PYTHON ?= python3.11
VENV ?= .venv
PIP_FLAGS ?=
OUT ?= runs/demo
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.PHONY: demo test lint check startup clean

demo: $(VENV)/.installed
	$(BIN)/expunge demo --out $(OUT)
	@echo "Open $(OUT)/report.html"

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

startup: $(VENV)/.installed
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf $(VENV)

# Stamp files: installing again is needed only when the dependencies changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@
