# The one vocabulary of tasks: people, hooks and CI use these names.

VENV   := .venv
BIN    := $(VENV)/bin
# One thread per process: two test processes or one training process share the cores without fighting.
TEST   := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: help setup demo test test-fast test-chain pythons check format lock compile clean

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## the locked environment; PYTHON=... chooses among the three Pythons
	@test -z "$(PYTHON)" && $(BIN)/python environment/install.py --venv $(VENV) --check 2>/dev/null || \
	  { python=$$(environment/find_python.sh $(VENV)) && "$$python" environment/install.py --venv $(VENV); }

demo: setup  ## the whole chain of params.yaml on real small images, then the verdict
	@$(BIN)/vitpipe compile --dvc
	@PATH="$$(cd $(BIN) && pwd):$$PATH" dvc repro --quiet
	@$(BIN)/vitpipe verdict

test: setup  ## every test
	@$(TEST)

test-fast: setup  ## the inner loop: nothing slow, no engines
	@$(TEST) -m "not slow and not docker"

test-chain: setup  ## the whole chain at its smallest, by DVC and by the compiled commands
	@$(BIN)/pytest -m "not docker" tests/pipelines/test_chain.py

pythons: setup  ## installation, fast tests and smallest chain on the other Pythons that the lock is for
	@for version in 3.13 3.12 3.11; do \
	  $(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] == sys.argv[1])' $$version || continue; \
	  python=$$(PYTHON= ONLY=$$version environment/find_python.sh) || exit 2; \
	  echo "make: Python $$version in build/pythons/$$version"; \
	  $(MAKE) --no-print-directory VENV=build/pythons/$$version PYTHON="$$python" test-fast test-chain || exit 1; \
	done

check: setup  ## format, lint, types, house rules
	@$(BIN)/ruff format --check --quiet . || { echo "make: run 'make format'"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy && MYPYPATH=environment $(BIN)/mypy environment/install.py
	@$(BIN)/pytest tests/test_house_rules.py

format: setup  ## let ruff format and sort
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

compile: setup  ## dvc.yaml and the Kubeflow package for params.yaml
	@$(BIN)/vitpipe compile --dvc
	@$(BIN)/vitpipe compile --out build/pipeline.yaml

lock:  ## resolve requirements.lock again from pyproject.toml, for all three Pythons
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --custom-compile-command "make lock" --quiet --upgrade \
	  --no-emit-package opencv-python -o requirements.lock

clean:  ## remove artifacts, keep the environment and DVC's cache
	rm -rf artifacts build
