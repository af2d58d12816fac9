# Every target works in a fresh clone with make and Python >= 3.11. `make help` lists them.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
            $(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
# Without an NVIDIA GPU the CPU build of torch: the default build brings gigabytes of CUDA libraries.
CPU_TORCH := torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch,$(CPU_TORCH))
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 2

.PHONY: help quickstart reproduce-smollm2 test test-slow test-gpu lint audit format install install-dev docs wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: TORCH='torch==X' another torch, PYTHON=python3.12, ARGS='--device cuda' for quickstart, VENV=folder, JOBS=4 processes for test, DATA=text SUITE=folder for reproduce-smollm2"

quickstart: $(VENV)/.installed ## profile, distil, search and report on SmolLM2-135M
	$(BIN)/nasbench quickstart $(ARGS)

reproduce-smollm2: $(VENV)/.installed ## the recipe smollm2-135m: train, search, finalise and measure its hybrids (one GPU, half an hour)
	$(BIN)/nasbench run smollm2-135m --out runs/smollm2-135m $(if $(DATA),--set data=$(DATA)) $(if $(SUITE),--set suite=$(SUITE)) $(ARGS)

test: $(VENV)/.installed-dev ## the test suite (CPU, 8 to 9 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not gpu and not hub and not slow" -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(VENV)/.installed-dev ## the tests that take more than a minute each
	$(BIN)/python -m pytest -m "slow and not gpu and not hub" --timeout 1200 $(ARGS)

test-gpu: $(VENV)/.installed-dev ## the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(VENV)/.installed ## known vulnerabilities of what nasbench needs (asks the package index)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable

format: $(VENV)/.installed-dev ## ruff, with fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed ## make .venv with nasbench in it
install-dev: $(VENV)/.installed-dev ## the same with the test tools

docs: $(VENV)/.installed-dev ## build the documentation into site/
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/.installed-dev ## build dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove .venv and build outputs (runs/ stays)
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 with venv found: set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and on its own, so that nothing after it asks the package index for another build.
$(VENV)/.torch: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@
