# make demo: three tiny language models, trained here, looked at, merged, and compared.
# make test: lint, types, all tests, and mergekit's own tests with the plugin and without.
# Both make .venv first; they need Python 3.10 or later, and a network on the first run, make test
# also later for mergekit's tests, which come from PyPI.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-mergekit bench clean

demo: $(VENV)/.installed
	$(BIN)/python demo/train.py
	$(BIN)/mergekit-karcher report example_configs/quickstart.yml
	$(BIN)/mergekit-yaml example_configs/quickstart.yml out
	$(BIN)/mergekit-yaml demo/linear.yml demo/out-linear
	$(BIN)/python demo/evaluate.py
	cd demo/models && ../../$(BIN)/mergekit-karcher compare --base base code manual names \
		--data code.txt --data manual.txt --data names.txt --length 64 --out ../compared

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
	$(MAKE) test-mergekit

test-mergekit: $(VENV)/.installed
	$(BIN)/python tests/mergekit_suite/run.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out demo/models demo/out-linear demo/compared
