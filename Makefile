# The tasks of the project; developers, hooks and CI use these names.

VENV   := .venv
BIN    := $(VENV)/bin
# One thread per process: otherwise each starts as many threads as there are cores. Three processes for two cores,
# because tests wait for the end of processes, for locks and for servers.
TEST   := OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist worksteal

.PHONY: help setup demo references test test-fast test-chain pythons check format lock kubectl images compile clean

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The first line is the fast path: a tenth of a second when the environment is current. It cannot be used when PYTHON
# is set, because the existing environment may have another one.
setup:  ## install the locked environment; PYTHON=... chooses the Python
	@test -z "$(PYTHON)" && $(BIN)/python environment/install.py --venv $(VENV) --check 2>/dev/null || \
	  { python=$$(environment/find_python.sh $(VENV)) && "$$python" environment/install.py --venv $(VENV); }
	@test -d artifacts || $(BIN)/vitpipe compile --dvc || true  # so that `dvc repro --dry` works on a fresh clone

demo: setup  ## run all stages of params.yaml, by default on small embedded images, then show the verdict
	@$(BIN)/vitpipe compile --dvc
	@$(BIN)/vitpipe repro
	@$(BIN)/vitpipe verdict

references: setup  ## run the demos over five seeds and record their results in vitpipe/papers/demo.yaml
	@$(BIN)/vitpipe references

test: setup  ## every test
	@$(TEST)

test-fast: setup  ## tests without the slow ones and without Docker
	@$(TEST) -m "not slow and not docker"

test-chain: setup  ## all stages at the smallest size, by DVC and by the compiled commands
	@$(BIN)/pytest -m "not docker" tests/pipelines/test_chain.py

pythons: setup  ## installation, fast tests and smallest pipeline on the other supported Pythons
	@for version in 3.13 3.12 3.11; do \
	  $(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] == sys.argv[1])' $$version || continue; \
	  python=$$(PYTHON= ONLY=$$version environment/find_python.sh) || exit 2; \
	  echo "make: Python $$version in build/pythons/$$version"; \
	  $(MAKE) --no-print-directory VENV=build/pythons/$$version PYTHON="$$python" test-fast test-chain || exit 1; \
	done

# A second mypy call, because environment/install.py imports its sibling as a script does.
check: setup  ## check format, lint, types, house rules
	@$(BIN)/ruff format --check --quiet . || { echo "make: files are not formatted. Fix: run 'make format'"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy && MYPYPATH=environment $(BIN)/mypy environment/install.py
	@$(BIN)/pytest tests/test_house_rules.py

format: setup  ## format the code and sort imports with ruff
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

kubectl: setup  ## fetch kubectl for the tests of k8s/, unless one is on the PATH
	@$(BIN)/python environment/fetch_kubectl.py

images:  ## build the Docker images train, dense and mlflow; docker/images.sh says what can be set
	@docker/images.sh

compile: setup  ## write dvc.yaml and the Kubeflow package for params.yaml
	@$(BIN)/vitpipe compile --dvc
	@$(BIN)/vitpipe compile --out build/pipeline.yaml

# No index URLs in the lock: everybody installs from their own index. --universal resolves for all platforms and
# Pythons at once.
lock:  ## resolve requirements.lock from pyproject.toml, for all supported Pythons
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --custom-compile-command "make lock" --quiet --upgrade \
	  --no-emit-package opencv-python -o requirements.lock

clean:  ## remove artifacts, keep the environment and DVC's cache
	rm -rf artifacts build
