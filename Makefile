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

# What results/ holds, made again: every method and its ablations with three seeds, the model cards, speed.
SEEDS := 0 1 2
ASKED := 2000
METHODS := autoselect stepprune recon
AUTO_VARIANTS := scale_gate global_denoiser random_scorer
STEP_VARIANTS := causal last uniform alive batch_mean all_hops no_hops unaligned
RECON_VARIANTS := plain softmax softmax_plain shallow deep short conditional
scale_gate := --method autoselect --gate scale
global_denoiser := --method autoselect --denoiser global
random_scorer := --method autoselect --scorer random
causal := --method stepprune --causal True
last := --method stepprune --aggregation last
uniform := --method stepprune --aggregation uniform
alive := --method stepprune --aggregation alive
batch_mean := --method stepprune --budget batch_mean
all_hops := --method stepprune --hops -1
no_hops := --method stepprune --hops 0
unaligned := --method stepprune --align False
plain := --method recon --regulariser plain
softmax := --method recon --estimator softmax
softmax_plain := --method recon --estimator softmax --regulariser plain
shallow := --method recon --layers 1
deep := --method recon --layers 8
short := --method recon --epochs 1
conditional := --method recon --condition 2
.PHONY: results cards rivals classify speed ablations pages $(METHODS) $(AUTO_VARIANTS) $(STEP_VARIANTS) $(RECON_VARIANTS)
results: $(METHODS) cards rivals classify speed ablations pages
stepprune: private BESIDE = $(SEEDS:%=runs/autoselect_s%)
stepprune: autoselect
recon: private BESIDE = $(SEEDS:%=runs/autoselect_s%)
recon: private BUDGETS = --budgets 72 58 32 16 8
recon: private ASKED = 1000
recon: autoselect
$(METHODS): .venv/ready
	for s in $(SEEDS); do $(BIN)/python train.py --method $@ --seed $$s --run runs/$@_s$$s --evaluate False; done
	$(BIN)/python evaluate.py --n $(ASKED) --exact True $(BUDGETS) --out results/$@_tiny --run $(SEEDS:%=runs/$@_s%) $(BESIDE)
	rm -rf results/$@_tiny/selector
	cp -r runs/$@_s0/selector results/$@_tiny/selector
cards: .venv/ready
	for m in llava qwen2_5_vl; do $(BIN)/python evaluate.py --model tiny/$$m --methods random evidence --n 2000 \
		--pictures False --out results/tiny_$$m; done
	$(BIN)/python train.py --model tiny/qwen2_5_vl --run runs/autoselect_qwen --evaluate False
	$(BIN)/python evaluate.py --n 2000 --run runs/autoselect_qwen --out results/autoselect_tiny_qwen
SHARES := --budgets 0.33333 0.22222 0.11111 --sample 1000 --batch 32
rivals: .venv/ready
	$(BIN)/python evaluate.py --model tiny/llava --benchmarks scenes --methods all $(SHARES) --out results/rivals_llava \
		--run $(foreach m,$(METHODS),$(SEEDS:%=runs/$(m)_s%))
	$(BIN)/python evaluate.py --model tiny/qwen2_5_vl --benchmarks scenes --methods all $(SHARES) --out results/rivals_qwen2_5_vl
	$(BIN)/python -m benchmarks.shapes llava-1.5-7b runs/shapes/four --layers 4
	$(BIN)/python evaluate.py --model runs/shapes/four --random_weights True --benchmarks scenes --methods all \
		--budgets 192 128 64 --sample 2 --batch 2 --out results/rivals_speed --pictures False --resamples 10
classify: .venv/ready
	$(BIN)/python evaluate.py --classify tiny/vit --run results/autoselect_tiny/selector --methods random cls_attention \
		holov visionzip divprune --budgets 48 32 16 8 4 --out results/classify_tiny
speed: .venv/ready
	$(BIN)/python evaluate.py --speed --out results/speed
	$(BIN)/python -m benchmarks.flops
$(RECON_VARIANTS): BUDGETS = --budgets 72 58 32 16 8
$(RECON_VARIANTS): ASKED = 600
$(AUTO_VARIANTS) $(STEP_VARIANTS) $(RECON_VARIANTS): .venv/ready
	for s in $(SEEDS); do $(BIN)/python train.py $($@) --seed $$s --run runs/$@_s$$s --evaluate False; done
	$(BIN)/python evaluate.py --n $(ASKED) --methods random --gated True --pictures False $(BUDGETS) \
		--out results/ablations/$(word 2,$($@))/$@ --run $(SEEDS:%=runs/$@_s%)
ablations: $(AUTO_VARIANTS) $(STEP_VARIANTS) $(RECON_VARIANTS)
	$(BIN)/python evaluate.py --n 2000 --methods random --gated True --pictures False \
		--out results/ablations/autoselect/base --run $(SEEDS:%=runs/autoselect_s%)
	for m in $(METHODS); do $(BIN)/python evaluate.py --ablations $$m; done
	$(BIN)/python evaluate.py --run $(SEEDS:%=runs/recon_s%) $(SEEDS:%=runs/plain_s%) --curves results/recon_tiny/collapse.png
pages: .venv/ready
	$(BIN)/python -c "import evaluate, pathlib; [evaluate.refresh(pathlib.Path(p)) for p in ('README.md', 'tiny/README.md', 'results/README.md', \
		*pathlib.Path('results').glob('*/selector/README.md'))]"
