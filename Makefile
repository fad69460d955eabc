# Each target makes the environment that it needs; PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORAGE ?= runs/quickstart
READY := $(VENV)/.ready

.PHONY: help quickstart test test-all lint ui clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'

# The exact versions of constraints.txt. torch comes first and by its pin, so that no newer build is taken.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY)  ## the whole path: task model, adapters, sweep, server, report (minutes on two cores)
	$(BIN)/python -m ray_jobs.quickstart --storage $(STORAGE) $(ARGS)

test: $(READY)  ## the tests
	$(BIN)/python -m pytest

test-all: $(READY)  ## the tests, the long ones too
	$(BIN)/python -m pytest -m ''

lint: $(READY)  ## format, rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: $(READY)  ## MLflow's pages on the runs of STORAGE, on this machine only
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(abspath $(STORAGE))/mlflow.db --host 127.0.0.1 --port 5000

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs
