# Fresh machine: `make tune` or `make test`. Everything lives in .venv, with pinned versions.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TRITON ?= 3.6.0
FLAGS ?=
BIN := $(VENV)/bin
KERNELS := flash_fwd flash_bwd

.PHONY: help setup tune test test-slow lint clean

help:
	@echo "make setup       create $(VENV) from the pinned constraints"
	@echo "make tune        tune the quickstart problems, forward and backward (FLAGS='--target a100' to choose)"
	@echo "make test        run the tests (make test-slow: the long ones too)"
	@echo "make lint        ruff, mypy and the layer contracts"

setup: $(VENV)/.ready

# Torch comes first and pinned: a later package asking for plain `torch` would bring another build. Where the machine's own
# Python already has a torch that sees a GPU, that one is used, with the Triton that belongs to it.
$(VENV)/.ready: constraints.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, found $$($(PYTHON) --version)"; \
	    echo; echo "hint: make setup PYTHON=python3.12"; exit 3; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot create virtual environments"; echo; \
	    echo "hint: apt-get install python3-venv"; exit 3; }
	@if $(PYTHON) -c 'import torch, triton, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	  echo "Using the torch of $(PYTHON), which sees a GPU"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/pip install -q -c constraints.txt torch==$(TORCH); \
	  $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install -q -c constraints.txt triton==$(TRITON); \
	fi
	@$(BIN)/pip install -q -c constraints.txt setuptools wheel
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[nvml,report]'
	@touch $@

# What only tests need: the tools, and the libraries that exports, fleets and replays are checked with.
$(VENV)/.tests-ready: $(VENV)/.ready
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[test,nvml,rivals,fleet,report]' \
	  docstring-parser einops kernels transformers
	@$(BIN)/pip install -q -c constraints.txt --no-deps fla-core flashinfer-bench
	@touch $@

tune: setup
	@for kernel in $(KERNELS); do $(BIN)/flashtune tune $$kernel --workload quickstart --draft $(FLAGS) || exit $$?; done

test: $(VENV)/.tests-ready
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' $(FLAGS)

test-slow: $(VENV)/.tests-ready
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(FLAGS)

lint: $(VENV)/.tests-ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check examples harness search_spaces tests
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
