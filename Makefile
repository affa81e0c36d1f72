# `make demo` and `make test` install what they need into .venv and run; the second run installs nothing.
#   PYTHON=python3.12      the interpreter that makes .venv (3.11 or newer, with venv)
#   CC=gcc                 builds the native kernels; without it they are left out, and steps take 4 to 6 times as long
#   TORCH_INDEX=URL        an extra package index for torch. Empty: pip's own indexes decide, and on Linux PyPI's
#                          torch brings CUDA packages. CPU build: TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
FRAME := setup.cfg setup.py pyproject.toml constraints.txt $(wildcard worldmodel/native/*.[ch])

export OMP_WAIT_POLICY := PASSIVE

.PHONY: help demo test test-slow check bench soak clean
help:
	@echo "make demo | test | test-slow | check | bench | soak | clean"

demo: $(VENV)/.stamp-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.stamp-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python .ci/check_docs.py

bench: $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks

# Half an hour of a server under clients that are killed; `make soak SOAK_MINUTES=5` for less.
SOAK_MINUTES ?= 30
soak: $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks.soak --minutes $(SOAK_MINUTES)

# One after the other, so that `make -j` never runs two installations at once.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "error: $(PYTHON) is missing or older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-venv $(FRAME)
	$(PIP_INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info worldmodel/native/*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
