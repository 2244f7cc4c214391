# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo check test test-all bench clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,seq2seq]'
	touch $@

install: $(STAMP) ## make .venv with everything the other targets need

demo: $(STAMP) ## teacher, four students, a table and a figure on data every machine has; five minutes
	HF_HUB_OFFLINE=1 $(BIN)/layerdistill demo

check: $(STAMP) ## formatting, lint, types, import ranks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests/test_structure.py

test: $(STAMP) ## every test that is not marked slow
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-all: $(STAMP) ## the slow tests too
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m ''

bench: $(STAMP) ## what a step costs here, in a loop written by hand and in other tools; hours; BENCH=--quick: two minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.bench $(BENCH)

clean: ## delete what the other targets made
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache
