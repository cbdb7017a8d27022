# Everything sets itself up in .venv: `make train` is the main command, `make test` the other one.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint
train: .venv/ready
	$(BIN)/python train.py --method autoselect
test: .venv/ready lint
	$(BIN)/python -m pytest
lint: .venv/ready
	$(BIN)/ruff check .
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
