# Another interpreter: make python=3.12 install
python ?= 3
VENV := .venv
PYTHON := $(VENV)/bin/python
DEMO := demo
QUANTIZATION := $(VENV)/quantization
# Matrices this small are slower on two threads, and two processes test at once.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest

.DEFAULT_GOAL := help
.PHONY: help install demo app check test test-all clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s  %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## make .venv, with this project and what tests it

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v python$(python) >/dev/null || { echo "error: python$(python) is not on the PATH: name another with make python=3.12 install" >&2; exit 1; }
	@python$(python) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: python$(python) is older than 3.10: name another with make python=3.12 install" >&2; exit 1; }
	python$(python) -m venv $(VENV)
	PYTHONWARNINGS=ignore $(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

# Training takes one thread, as the tests do.
demo: install ## generate, train and evaluate on handwritten digits
	$(PYTHON) -m pipeline.generate --config configs/generate/mnist_dit.yaml output_dir=$(DEMO)/data
	OMP_NUM_THREADS=1 $(PYTHON) -m pipeline.train --config configs/train/lora.yaml data_dir=$(DEMO)/data output_dir=$(DEMO)/adapter max_train_steps=2000
	$(PYTHON) -m pipeline.evaluate adapter_dir=$(DEMO)/adapter 'guidance_scale=[1.5,2,3]' 'methods=[one_pass]'

app: install ## show the demo's adapter in a browser, with a slider of guidance scales
	@test -f $(DEMO)/adapter/adapter_config.json || { echo "error: $(DEMO)/adapter: no adapter there: run make demo first" >&2; exit 1; }
	$(PYTHON) -m pipeline.app adapter_dir=$(DEMO)/adapter

check: install ## ruff, mypy and import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: check ## check, then every test but the long ones and the zoo
	$(PYTEST) --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Apart from the rest: diffusers imports them wherever it finds them, which takes time and prints warnings.
$(QUANTIZATION): constraints.txt | install
	rm -rf $@
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt --target $@ torchao bitsandbytes gguf

test-all: test $(QUANTIZATION) ## test, then the long tests, the zoo of pipelines, and quantised bases
	$(PYTEST) -m long --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(PYTEST) -m zoo --numprocesses 2 tests/pipelines_zoo tests/test_pipelines.py
	PYTHONPATH=$(QUANTIZATION) $(PYTEST) -m 'not zoo' -k 'quantised or int8 or fp8 or nf4 or gguf' tests/stages/train tests/stages/base tests/stages/adapters/test_compositions.py tests/benchmarks/test_training_memory.py

clean: ## remove .venv and what the demo made
	rm -rf $(VENV) $(DEMO)
