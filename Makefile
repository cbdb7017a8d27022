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

# What results/ holds, made again: AutoSelect and its ablations with three seeds, the model card, speed.
SEEDS := 0 1 2
VARIANTS := scale_gate global_denoiser random_scorer
scale_gate := --gate scale
global_denoiser := --denoiser global
random_scorer := --scorer random
.PHONY: results ablations
results: .venv/ready
	for s in $(SEEDS); do $(BIN)/python train.py --seed $$s --run runs/autoselect_s$$s --evaluate False; done
	$(BIN)/python evaluate.py --n 2000 --out results/autoselect_tiny --run $(SEEDS:%=runs/autoselect_s%)
	mkdir -p results/autoselect_tiny/selector
	cp runs/autoselect_s0/config.json runs/autoselect_s0/selector.safetensors results/autoselect_tiny/selector
	$(BIN)/python evaluate.py --model tiny/llava --methods random evidence --n 2000 --pictures False --out results/tiny_llava
	$(BIN)/python evaluate.py --speed --out results/speed
	$(BIN)/python -c "import evaluate, pathlib; [evaluate.refresh(pathlib.Path(p)) for p in ('README.md', 'tiny/README.md')]"
ablations: $(VARIANTS)
	$(BIN)/python evaluate.py --ablations autoselect
.PHONY: $(VARIANTS)
$(VARIANTS): .venv/ready
	for s in $(SEEDS); do $(BIN)/python train.py $($@) --seed $$s --run runs/$@_s$$s --evaluate False; done
	$(BIN)/python evaluate.py --n 2000 --methods random --gated True --pictures False \
		--out results/ablations/autoselect/$@ --run $(SEEDS:%=runs/$@_s%)
