# make demo | test | test-all | check | install; another interpreter: make python=3.12 install
python ?= 3
VENV := .venv
PYTHON := $(VENV)/bin/python
DEMO := demo
QUANTIZATION := $(VENV)/quantization

.PHONY: install demo test test-all check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v python$(python) >/dev/null || { echo "error: python$(python) is not on the PATH: name another with make python=3.12 install" >&2; exit 1; }
	@python$(python) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: python$(python) is older than 3.10: name another with make python=3.12 install" >&2; exit 1; }
	python$(python) -m venv $(VENV)
	PYTHONWARNINGS=ignore $(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

# Training takes one thread: matrices this small are slower on two.
demo: install
	$(PYTHON) -m pipeline.generate --config configs/generate/mnist_dit.yaml output_dir=$(DEMO)/data
	OMP_NUM_THREADS=1 $(PYTHON) -m pipeline.train --config configs/train/lora.yaml data_dir=$(DEMO)/data output_dir=$(DEMO)/adapter max_train_steps=2000
	$(PYTHON) -m pipeline.evaluate adapter_dir=$(DEMO)/adapter 'guidance_scale=[1.5,2,3]' 'methods=[one_pass]'

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Apart from the rest: diffusers imports torchao wherever it finds it, which takes time and prints warnings.
$(QUANTIZATION): constraints.txt | install
	rm -rf $@
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt --target $@ torchao

test: check $(QUANTIZATION)
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
	PYTHONPATH=$(QUANTIZATION) $(PYTHON) -m pytest -k 'quantised or int8' tests/stages/train tests/stages/adapters/test_compositions.py tests/benchmarks/test_training_memory.py

# Every pipeline of the zoo from end to end as well.
test-all: test
	$(PYTHON) -m pytest -m zoo --numprocesses 2 tests/pipelines_zoo tests/test_pipelines.py

clean:
	rm -rf $(VENV) $(DEMO)
