# make quickstart: set up, make the data, train, evaluate, write the report.   make test: set up, run the whole suite.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/quickstart
SET ?=

export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test setup setup-test clean

quickstart: $(VENV)/.main
	$(BIN)/python train.py --config configs/quickstart.yaml --set run.dir=$(RUN_DIR) $(SET)
	@echo "Open $(RUN_DIR)/report.html"

test: $(VENV)/.test
	$(BIN)/python -m pytest

setup: $(VENV)/.main
setup-test: $(VENV)/.test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.main: $(BIN)/python requirements/main.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/main.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# torch is pinned exactly: an unpinned torch brings gigabytes of CUDA libraries with it.
$(VENV)/.test: $(VENV)/.main requirements/test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
