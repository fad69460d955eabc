# Each target sets up the environment that it needs. PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORAGE ?= runs/quickstart
WORKERS ?= 2
PORT ?= 5000
READY := $(VENV)/.ready

.PHONY: help quickstart llama test test-gpu test-numeric test-processors test-ray test-all check lint docs dist ui clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

# The exact versions of constraints.txt. torch is installed first, by its pin, so that pip takes no newer build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; name one of these: make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY)  ## a guided tour: train, compare, plan, serve, report (minutes on two cores)
	$(BIN)/python -m ray_jobs.quickstart --storage $(STORAGE) $(ARGS)

llama: STORAGE = runs/llama-tour
llama: $(READY)  ## the same tour on a LLaMA that answers by label words (at most 15 minutes on two cores)
	$(BIN)/python -m revmux fetch --name smollm2-135m
	test -f $(STORAGE)/calibrated.yaml || $(BIN)/python -m revmux calibrate smollm2-135m sst2-few-shot $(STORAGE)/calibrated.yaml \
	  --data.source sentiment --data.selection_share 0.004 --data.test_share 0.01
	$(BIN)/python -m ray_jobs.quickstart --config ray_jobs/tour/llama.yaml --backbone.prompt $(STORAGE)/calibrated.yaml \
	  --storage $(STORAGE) $(ARGS)

test: $(READY)  ## run the tests in WORKERS processes and measure coverage
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder --cov --cov-report=term

test-numeric: $(READY)  ## run the tests that compute with models, without Ray
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'numeric and not long'

test-gpu: $(READY)  ## run the tests that need a GPU; without one, they are skipped
	$(BIN)/python -m pytest -m gpu -rs tests/test_gpu.py

test-processors: $(READY)  ## run the numeric tests as other processors would compute (nightly)
	PYTHON=$(BIN)/python .ci/processors

# Only Ray is exchanged. All other packages keep the versions of constraints.txt.
test-ray: $(READY)  ## run the tests that use Ray on another version of it: make test-ray RAY=2.59.0 (nightly)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target build/ray-$(RAY) ray==$(RAY)
	PYTHONPATH=$(abspath build/ray-$(RAY)) $(BIN)/python -c 'import ray; assert ray.__version__ == "$(RAY)", ray.__file__'
	PYTHONPATH=$(abspath build/ray-$(RAY)) $(BIN)/python -m pytest -m 'not long' tests/test_ray_internals.py tests/test_ray_log.py
	PYTHONPATH=$(abspath build/ray-$(RAY)) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'cluster and not long'

test-all: $(READY)  ## run the tests in WORKERS processes, the long ones too (nightly)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -m ''

check: $(READY)  ## check format, lint, types, import layers, spelling and workflow files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/mypy

lint: check  ## the same as check

docs: $(READY)  ## build the documentation in docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

dist: $(READY)  ## build the wheel and the sdist in dist/ and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

ui: $(READY)  ## show the runs of STORAGE in MLflow on http://127.0.0.1:PORT
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(abspath $(STORAGE))/mlflow.db --host 127.0.0.1 --port $(PORT)

clean:  ## remove the environment, the runs and everything built
	rm -rf $(VENV) runs build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache
