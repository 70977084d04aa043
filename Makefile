# Each target sets up what it needs in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types bench clean

demo: $(VENV)/.demo ## train and measure the demo study, print its table, write runs/demo/report
	$(BIN)/sinkbed study configs/study/packing.yaml --seeds 0 --out runs/demo --arms causal causal-bos-fixed \
		causal-bos-fixed-learned causal-random-first document-bos-documents document-bos-fixed

test: $(VENV)/.dev ## the tests, but for those that are long and rarely break; all of them with CI=true
	$(BIN)/python -m pytest -n 3 --dist worksteal $(if $(CI),,-m "not slow")

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	rm -rf build/types && mkdir -p build/types/sinkbed
	cd build/types/sinkbed && ln -s $(addprefix ../../../,data kernels model train $(wildcard train/sinkbed/*.py)) .
	$(BIN)/mypy

bench: $(VENV)/.dev ## training step against Hugging Face's Llama; run it on an idle machine
	$(BIN)/sinkbed bench training

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -e '.[demo,bench,dev]'
	touch $@

clean: ## forget what was set up and trained
	rm -rf $(VENV) runs stores
