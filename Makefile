# make quickstart: set up, make the data, train, evaluate, write the report.   make test: set up, lint, run the whole suite.   make lint: only the first part.
# make docs: the documentation site.
# make conformance: the real torch_npu on an emulated CANN runtime, in an environment of its own; writes docs/conformance.md (CONFORMANCE_PAGE).
# make aot: the recipes' training steps at cut depth compiled by the real XLA:TPU, in an environment of its own; writes docs/aot.md.
# make aot-gpu: by the real XLA:GPU, in an environment of 5 GB.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
NPU_VENV := .venv-npu
NPU_BIN := $(NPU_VENV)/bin
TPU_VENV := .venv-tpu
TPU_BIN := $(TPU_VENV)/bin
GPU_VENV := .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
DOCS_VENV := .venv-docs
RUN_DIR ?= runs/quickstart
SET ?=
WORKERS ?= 2

# JAX runs on the CPU unless an accelerator is here: then JAX chooses, and ACCELERATOR says what `make setup` installs for it.
ifneq ($(shell nvidia-smi -L 2>/dev/null),)
ACCELERATOR ?= cuda13
else ifneq ($(wildcard /dev/accel0 /dev/vfio/0),)
ACCELERATOR ?= tpu
else
ACCELERATOR ?=
export JAX_PLATFORMS ?= cpu
endif

.PHONY: quickstart average test lint jax-tests docs conformance aot aot-gpu setup setup-test setup-npu setup-tpu setup-gpu clean

quickstart: $(VENV)/.main
	$(BIN)/python train.py --config configs/quickstart.yaml --set run.dir=$(RUN_DIR) $(SET)
	@echo "Open $(RUN_DIR)/report.html"

# Two continuations of the finished quickstart at two sequence lengths, their average, and the scores of all (configs/average-*.yaml).
AVERAGE_TASKS := digits=data/quickstart/test/digits.parquet,words=data/quickstart/test/words.parquet,emoji=data/quickstart/test/emoji.parquet,easyvqa=data/quickstart/test/easyvqa.parquet
average: $(VENV)/.main
	$(BIN)/python train.py --config configs/average-short.yaml --set run.init_from=$(RUN_DIR) $(SET)
	$(BIN)/python train.py --config configs/average-long.yaml --set run.init_from=$(RUN_DIR) $(SET)
	rm -rf runs/average
	$(BIN)/mindvl average --weights runs/average-short runs/average-long --out runs/average
	for model in $(RUN_DIR) runs/average-short runs/average-long runs/average; do \
		echo "$$model"; $(BIN)/mindvl evaluate --weights $$model --tasks $(AVERAGE_TASKS) --batch 64 --max-new-tokens 16 --no-language-only --out $$model/evaluation-average || exit 1; \
	done

# Style, likely bugs and the types of the public surface: half a minute in a fresh clone, two seconds after that.
lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

# A module's tests stay in one process, so that its fixtures are made once; modules begin in the order of tests/conftest.py. A process
# that dies ends the suite at once: pytest-xdist would start another one, lose the dead one's last tests and wait for them for ever.
test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --max-worker-restart 0

# JAX's own tests through the bridge. JAX_TESTS: tests/ of the source release of the installed jax; EACH: tests drawn of each module, 0 for all.
EACH ?= 40
jax-tests: $(VENV)/.test
	JAX_PLATFORMS=cpu NPU_BRIDGE_CACHE=off $(BIN)/python -m tests.bridge.jax_tests $(JAX_TESTS) --each $(EACH) --page docs/jax_tests.md

# torch_npu is never installed beside the other tests: without CANN it makes a plain `import torch` fail.
CONFORMANCE_PAGE ?= docs/conformance.md
conformance: $(NPU_VENV)/.npu
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(NPU_BIN)/python -m npu_bridge.emulator.conformance --page $(CONFORMANCE_PAGE) --processes $(WORKERS)

# The training steps of the recipes by the real XLA:TPU, which needs no device; writes docs/aot.md (AOT_PAGE). By hand, at full depth:
# AOT_ARGS="--recipes v5p" (or v6e, mesh), and `make aot-gpu` for H100.
AOT_PAGE ?= docs/aot.md
AOT_ARGS ?=
aot: export JAX_PLATFORMS = cpu
aot: $(TPU_VENV)/.tpu
	TPU_SKIP_MDS_QUERY=1 $(TPU_BIN)/python -m mindvl_jax.planning.aot --page $(AOT_PAGE) $(AOT_ARGS)

aot-gpu: export JAX_PLATFORMS = cpu
aot-gpu: $(GPU_VENV)/.gpu
	$(GPU_BIN)/python -m mindvl_jax.planning.aot --recipes h100 --page $(AOT_PAGE) $(AOT_ARGS)

# The documentation site in build/site; a broken link or an unknown name of the reference fails it.
docs: $(DOCS_VENV)/.docs
	$(DOCS_VENV)/bin/mkdocs build

setup: $(VENV)/.main
setup-test: $(VENV)/.test
setup-npu: $(NPU_VENV)/.npu
setup-tpu: $(TPU_VENV)/.tpu
setup-gpu: $(GPU_VENV)/.gpu

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.main: $(BIN)/python requirements/main.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/main.txt
	$(if $(ACCELERATOR),$(BIN)/python -m pip install --quiet --disable-pip-version-check "jax[$(ACCELERATOR)]==$$(sed -n 's/^jax==//p' requirements/main.txt)")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# torch is pinned exactly: an unpinned torch brings gigabytes of CUDA libraries with it.
$(VENV)/.test: $(VENV)/.main requirements/test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
	touch $@

# A thin environment: what $(VENV) holds is seen from here through main.pth (a pip of its own is not needed either), so that only
# torch_npu is installed, in seconds, and both compare with the same torch.
$(NPU_VENV)/.npu: $(VENV)/.test requirements/npu.txt
	$(PYTHON) -m venv --without-pip $(NPU_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(NPU_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	$(NPU_BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/npu.txt
	$(NPU_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(TPU_VENV)/.tpu: $(VENV)/.main requirements/tpu.txt
	$(PYTHON) -m venv --without-pip $(TPU_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(TPU_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	$(TPU_BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/tpu.txt
	touch $@

$(GPU_VENV)/.gpu: $(VENV)/.main requirements/gpu.txt
	$(PYTHON) -m venv --without-pip $(GPU_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(GPU_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	$(GPU_BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/gpu.txt
	touch $@

$(DOCS_VENV)/.docs: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	touch $@

clean:
	rm -rf $(VENV) $(NPU_VENV) $(TPU_VENV) $(GPU_VENV) $(DOCS_VENV) build *.egg-info
