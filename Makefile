# Everything sets itself up in .venv: `make train` is the main command, `make test` the other one.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: train test test-all lint
train: .venv/ready
	$(BIN)/python train.py --method autoselect
test: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"
test-all: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)
lint: .venv/ready
	$(BIN)/ruff check .
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

# What results/ holds, made again. Of the shipped selectors, one seed each, in a quarter of an hour:
.PHONY: headline cards rivals classify speed
SHIPPED := $(foreach m,autoselect stepprune recon,results/$(m)_tiny/selector)
headline: .venv/ready
	$(BIN)/python evaluate.py --run $(SHIPPED) --methods random downsample cls_attention --sample 2000 \
		--out results/headline
	$(BIN)/python -m measure.likeness --run results/autoselect_tiny/selector --out results/headline/likeness.png
cards: .venv/ready
	$(BIN)/python -m measure.check tiny/llava --out results/check
	for m in llava qwen2_5_vl; do $(BIN)/python evaluate.py --model tiny/$$m --methods random evidence \
		--sample 2000 --draw False --out results/tiny_$$m; done
SHARES := --budgets 0.33333 0.22222 0.11111
QWEN := $(foreach m,autoselect stepprune,runs/$(m)_qwen_s0/selector)
rivals: .venv/ready $(QWEN)
	$(BIN)/python evaluate.py --run $(SHIPPED) --methods all $(SHARES) --out results/rivals_llava
	$(BIN)/python evaluate.py --run $(QWEN) --methods all $(SHARES) --out results/rivals_qwen2_5_vl
# on the tiny Qwen2.5-VL, where they are not at hand:
runs/%_qwen_s0/selector: | .venv/ready
	$(BIN)/python train.py --method $* --model tiny/qwen2_5_vl --run runs/$*_qwen_s0 --evaluate False
classify: .venv/ready
	$(BIN)/python -m measure.classify tiny/vit --run results/autoselect_tiny/selector --methods random cls_attention \
		holov visionzip divprune --budgets 48 32 16 8 4 --out results/classify_tiny
speed: .venv/ready
	$(BIN)/python -m measure.speed --out results/speed
	$(BIN)/python -m measure.flops
	for n in llava-1.5-7b llava-next-vicuna-7b qwen2.5-vl-7b; do $(BIN)/python -m measure.gpu $$n --shrink --device cpu \
		--parts memory --pictures 1 4 8 --options layers=2 --out results/memory/$$n; done

# A paper's main table on a real backbone: make paper PAPER=autoselect MODEL=llava-hf/llava-1.5-7b-hf
.PHONY: paper
paper: .venv/ready
	$(BIN)/python -m examples.headline $(PAPER) $(if $(MODEL),--model $(MODEL)) $(MORE)

# Every method and its ablations trained with three seeds: many hours.
.PHONY: results ablations
SEEDS := 0 1 2
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
batch_mean := --method stepprune --k_rule batch_mean
all_hops := --method stepprune --hops -1
no_hops := --method stepprune --hops 0
unaligned := --method stepprune --align False
plain := --method recon --regulariser plain
softmax := --method recon --estimator softmax
softmax_plain := --method recon --estimator softmax --regulariser plain
shallow := --method recon --layers 1
deep := --method recon --layers 8
short := --method recon --epochs 1
conditional := --method recon --select_after_layer 2
.PHONY: $(METHODS) $(AUTO_VARIANTS) $(STEP_VARIANTS) $(RECON_VARIANTS)
results: $(METHODS) ablations headline cards rivals classify speed
BUDGETS = --budgets 48 32 16
autoselect stepprune: ASKED = 2000
autoselect: WAYS = --ways gated
stepprune: WAYS = --ways exactly
recon: ASKED = 1000
recon: BUDGETS = --budgets 72 58 32 16 8
$(METHODS): .venv/ready
	for s in $(SEEDS); do $(BIN)/python train.py --method $@ --seed $$s --run runs/$@_s$$s --evaluate False; done
	rm -rf results/$@_tiny/selector
	mkdir -p results/$@_tiny
	cp -r runs/$@_s0/selector results/$@_tiny/selector
	$(BIN)/python evaluate.py --sample $(ASKED) $(BUDGETS) $(WAYS) --out results/$@_tiny --run $(SEEDS:%=runs/$@_s%)
$(AUTO_VARIANTS) $(STEP_VARIANTS): ASKED = 2000
$(RECON_VARIANTS): ASKED = 600
$(RECON_VARIANTS): BUDGETS = --budgets 72 58 32 16 8
$(AUTO_VARIANTS): WAYS = --ways gated
$(AUTO_VARIANTS) $(STEP_VARIANTS) $(RECON_VARIANTS): .venv/ready
	for s in $(SEEDS); do $(BIN)/python train.py $($@) --seed $$s --run runs/$@_s$$s --evaluate False; done
	$(BIN)/python evaluate.py --sample $(ASKED) --methods random --draw False $(BUDGETS) $(WAYS) \
		--out results/ablations/$(word 2,$($@))/$@ --run $(SEEDS:%=runs/$@_s%)
ablations: $(METHODS) $(AUTO_VARIANTS) $(STEP_VARIANTS) $(RECON_VARIANTS)
	for m in $(METHODS); do $(BIN)/python -m measure.ablations $$m; done
	$(BIN)/python -m measure.rebuild --run $(SEEDS:%=runs/recon_s%) --out results/recon_tiny
	$(BIN)/python -m measure.question_reading --run $(SEEDS:%=runs/conditional_s%) --out results/ablations/recon/conditional
	$(BIN)/python -m measure.training_curves $(SEEDS:%=runs/recon_s%) $(SEEDS:%=runs/plain_s%) --out results/recon_tiny/collapse.png
