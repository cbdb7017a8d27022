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

# What results/ holds, made again: three seeds of AutoSelect and of its ablations, the tiny VLMs' model card, speed.
SEEDS := 0 1 2
.PHONY: results
results: .venv/ready
	for s in $(SEEDS); do $(BIN)/python train.py --seed $$s --run runs/autoselect_s$$s --evaluate False; done
	$(BIN)/python evaluate.py --n 2000 --out results/autoselect_tiny --run $(SEEDS:%=runs/autoselect_s%)
	$(BIN)/python evaluate.py --model tiny/llava --methods random evidence --n 2000 --out results/tiny_llava
	$(BIN)/python evaluate.py --speed --out results/speed
	$(BIN)/python -c "import evaluate, pathlib; [evaluate.refresh(pathlib.Path(p)) for p in ('README.md', 'tiny/README.md')]"
