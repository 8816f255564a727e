# setup, pretrain and test create .venv if it is missing, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip shows what it does on a terminal. Python compiles a module when it is first imported, which is a tenth of them.
PIP = $(BIN)/python -m pip install $$([ -t 2 ] || echo --quiet) --disable-pip-version-check --no-compile -c constraints.txt
# JAX's CUDA libraries, where there is an NVIDIA GPU.
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda)
INPUTS := pyproject.toml constraints.txt
ARGS ?=

.PHONY: help setup pretrain test check format outputs lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  \1: /p' $(MAKEFILE_LIST)

setup: $(VENV)/base  ## create .venv and show the devices that JAX finds
	@$(BIN)/python -c "import jax; print('devices:', *(f'{d.device_kind} {d.id},' for d in jax.devices()))"

pretrain: $(VENV)/base  ## train the tiny model into runs/tiny (ARGS="--config.train.num_steps=50" changes fields)
	$(BIN)/ziggurat pretrain --config=tiny $(ARGS)

test: $(VENV)/test check  ## lint, types and all tests
	$(BIN)/python -m pytest -q -n logical --maxprocesses=4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/test  ## linter, formatter and type checker
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --no-error-summary

format: $(VENV)/test  ## format the code
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet

outputs: $(VENV)/base  ## run the commands that README.md and docs/ show, and renew their output (ARGS=--all: slow ones too)
	$(BIN)/python docs/outputs.py $(ARGS)

lock: $(VENV)/base  ## resolve constraints.txt again: make lock PYTHONS="python3.11 python3.12"
	$(BIN)/python .ci/lock.py $(or $(PYTHONS),$(PYTHON))

clean:  ## remove .venv and caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or later (Debian: apt install python3 python3-venv), or set PYTHON=..."; exit 2; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "$(PYTHON) is $$($(PYTHON) -V); Ziggurat needs 3.11 or later. Install one, or set PYTHON=..."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a venv: install its venv package (Debian: apt install python3-venv)"; exit 2; }

$(VENV)/base: $(INPUTS) | $(VENV)/bin/python
	@echo "installing JAX and what goes with it into $(VENV): $(or $(EXTRA:cuda=several GB),about 180 MB) to download"
	@$(PIP) -e .$(EXTRA:%=[%])
	@touch $@

$(VENV)/test: $(VENV)/base
	@$(PIP) -e .[test]
	@touch $@
