# On a fresh machine with Python 3.11-3.13 and make: `make train`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# File of version constraints, set by test-oldest and test-locked.
CONSTRAINTS :=

.PHONY: train test test-all test-backends test-no-fast test-oldest test-locked lint lock clean help

help:
	@echo "make train          create $(VENV), install, train with the defaults"
	@echo "make test           create $(VENV), install, then lint, types and tests"
	@echo "make test-all       make test with the slow tests"
	@echo "make test-backends  the tests with model.backend=reference and compiled"
	@echo "make test-no-fast   the tests in a copy without nn/fast"
	@echo "make lint           lint and types"
	@echo "make clean          remove the environments"
	@echo "make lock           pin all dependencies with hashes in requirements.lock"
	@echo "make test-oldest    the tests with the oldest supported PyTorch, installed in .venv-oldest"
	@echo "make test-locked    lint, types and tests with the versions of requirements.lock, in .venv-locked"

$(STAMP): pyproject.toml requirements-train.txt $(CONSTRAINTS)
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info < (3, 14), f'Python 3.11-3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...'"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-train.txt $(CONSTRAINTS:%=--constraints %)
	touch $@

train: $(STAMP)
	$(BIN)/python train.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto

test-all: lint
	$(BIN)/python -m pytest -n auto -m ""

test-backends: $(STAMP)
	$(BIN)/python -m pytest -n auto --backend=reference
	$(BIN)/python -m pytest -n auto --backend=compiled

# In a copy of the files that git tracks or would track.
test-no-fast: $(STAMP)
	rm -rf .no-fast && mkdir .no-fast
	git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | tar -xf - -C .no-fast
	rm -r .no-fast/src/bcos_train/nn/fast .no-fast/tests/nn/fast
	cd .no-fast && PYTHONPATH=src $(abspath $(BIN))/python -m pytest -n auto
	rm -rf .no-fast

# Without mypy, since the annotations of the newest PyTorch differ.
test-oldest:
	$(MAKE) .venv-oldest/.installed VENV=.venv-oldest CONSTRAINTS=requirements-oldest.txt
	.venv-oldest/bin/python -m pytest -n auto

test-locked:
	$(MAKE) test VENV=.venv-locked CONSTRAINTS=requirements.lock

# For Python 3.11 to 3.13 on every platform. --no-header, since the header contains options and paths.
lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --extra train --extra tensorboard --extra test --universal \
		--python-version 3.11 --generate-hashes --no-header --no-emit-index-url --output-file requirements.lock

clean:
	rm -rf $(VENV) .venv-oldest .venv-locked .no-fast
