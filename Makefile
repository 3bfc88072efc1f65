# The one vocabulary of tasks: people, hooks and CI use these names.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
UV     := 0.13.8
READY  := $(VENV)/.ready
# One thread per process: two test processes or one training process share the cores without fighting.
TEST   := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: help setup demo test test-fast check format lock compile clean

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## the locked environment, mmcv operators included

$(READY): requirements.lock requirements-ops.lock pyproject.toml docker/build_ops.py
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet uv==$(UV); }
	@echo "make: installing the locked environment (two minutes, 6 GB)"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --require-hashes --compile-bytecode -r requirements.lock
	@$(BIN)/python docker/build_ops.py
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: setup  ## the whole chain of params.yaml on real small images, then the verdict
	@$(BIN)/vitpipe compile --dvc
	@PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/dvc repro --quiet
	@$(BIN)/vitpipe verdict

test: setup  ## every test
	@$(TEST)

test-fast: setup  ## the inner loop: nothing slow, no engines
	@$(TEST) -m "not slow and not docker"

check: setup  ## format, lint, types, house rules
	@$(BIN)/ruff format --check --quiet . || { echo "make: run 'make format'"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/pytest tests/test_house_rules.py

format: setup  ## let ruff format and sort
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

compile: setup  ## dvc.yaml and the Kubeflow package for params.yaml
	@$(BIN)/vitpipe compile --dvc
	@$(BIN)/vitpipe compile --out build/pipeline.yaml

lock:  ## resolve requirements.lock again from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --all-extras --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --custom-compile-command "make lock" --quiet --upgrade \
	  --no-emit-package onedl-mmcv --no-emit-package opencv-python -o requirements.lock

clean:  ## remove artifacts, keep the environment and DVC's cache
	rm -rf artifacts build
