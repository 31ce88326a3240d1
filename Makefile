# Everything is set up by its first use: `make demo` and `make test` work in a fresh clone.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-lm test test-all lint docs bench ui clean

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.setup
DOCS := $(VENV)/.docs
# What is imported is compiled then; compiling everything takes half of an installation.
INSTALL := $(PYTHON) -m pip install --quiet --no-compile --constraint constraints.txt
# The interpreter the environment is made from; the first of these that can make one is taken.
BASE_PYTHON ?= python3.11 python3.12 python3.13 python3

# Models and data come from the package index (assets/prepare.py); nothing asks a hub or reports usage.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= true
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# More threads than 8 slow small models down; tokenizers' own threads clash with forked data loaders.
THREADS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ "$$n" -lt 8 ] && echo "$$n" || echo 8)
export OMP_NUM_THREADS ?= $(THREADS)
# Threads that spin while they wait make everything crawl as soon as another process wants a core.
export OMP_WAIT_POLICY ?= PASSIVE
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export TOKENIZERS_PARALLELISM ?= false

# Tests run in so many processes, a file of them in one: what tiny models take is one thread's work.
WORKERS ?= 2
TESTS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses $(WORKERS) --dist loadfile

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP) ## Make .venv with the pinned dependencies and this project, editable

$(STAMP): pyproject.toml constraints.txt
	@for candidate in $(BASE_PYTHON); do \
	    "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    test -x $(PYTHON) || "$$candidate" -m venv $(VENV); \
	    break; \
	done
	@test -x $(PYTHON) || { echo "No Python >= 3.11 with venv found among: $(BASE_PYTHON). Set BASE_PYTHON." >&2; exit 1; }
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev,test]'
	@touch $@

$(DOCS): $(STAMP)
	$(INSTALL) --editable '.[docs,ray,typecheck]'  # a tutorial has two workers of Ray
	@touch $@

demo: setup ## Search adapters for a real model on real data, show the front, export the choice
	$(PYTHON) -m assets.prepare minilm questions
	$(PYTHON) examples/demo.py

demo-lm: setup ## The same for a chat model on film dialogues, in about half an hour
	$(PYTHON) -m assets.prepare smollm2 dialogue
	$(VENV)/bin/autopeft search configs/dialogue.yaml
	$(VENV)/bin/autopeft export --knee --overwrite --to autopeft_runs/dialogue-adapter

test: setup ## All tests but the slow ones
	$(TESTS) -m "not slow and not gpu"

test-all: setup $(DOCS) ## The same with slow tests, coverage and, where there is a GPU, GPU tests
	$(TESTS) --cov --cov-report=term --cov-fail-under=90

lint: setup ## Only the static checks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy --num-workers $(WORKERS)

docs: setup $(DOCS) ## The documentation as a site in site/; tutorials are run, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build

bench: setup ## Measure; writes benchmarks/results
	$(PYTHON) -m assets.prepare minilm questions movies
	$(PYTHON) -m benchmarks.run

ui: setup ## MLflow UI on the front of the latest search
	$(VENV)/bin/autopeft ui

clean: ## Remove the environment, caches and what runs left; keeps .assets
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find . -name .assets -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
