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
	for s in $(SHIPPED); do cp results/headline/summary.md $$s/..; done
	$(BIN)/python -c "import sys; from benchmarks.tables import refresh; [*map(refresh, sys.argv[1:])]" \
		README.md results/README.md $(SHIPPED:%=%/README.md)
cards: .venv/ready
	$(BIN)/python -m measure.check tiny/llava --out results/check
	for m in llava qwen2_5_vl; do $(BIN)/python evaluate.py --model tiny/$$m --methods random evidence \
		--sample 2000 --draw False --out results/tiny_$$m; done
SHARES := --budgets 0.33333 0.22222 0.11111
QWEN := $(foreach m,autoselect stepprune recon,runs/claims/qwen2_5_vl/$(m)_s0/selector)
rivals: .venv/ready $(QWEN)
	$(BIN)/python evaluate.py --run $(SHIPPED) --methods all $(SHARES) --out results/rivals_llava
	$(BIN)/python evaluate.py --run $(QWEN) --methods all $(SHARES) --out results/rivals_qwen2_5_vl
# on the tiny Qwen2.5-VL, where they are not at hand:
runs/claims/qwen2_5_vl/%_s0/selector: | .venv/ready
	$(BIN)/python train.py --method $* --model tiny/qwen2_5_vl --run $(@D) --evaluate False
classify: .venv/ready
	$(BIN)/python -m measure.classify tiny/vit --run results/autoselect_tiny/selector --methods random cls_attention \
		holov visionzip divprune --budgets 48 32 16 8 4 --out results/classify_tiny
speed: .venv/ready
	$(BIN)/python -m measure.speed llava-1.5-7b --parts answers --layers 4 --batches 1 --device cpu --dtype float32 \
		--repeats 2 --new_tokens 1 --out results/speed/speed
	$(BIN)/python -m measure.speed --parts picks --device cpu --dtype float32 --out results/speed/pointer
	$(BIN)/python -m measure.flops
	for n in llava-1.5-7b llava-next-vicuna-7b qwen2.5-vl-7b; do $(BIN)/python -m measure.gpu $$n --shrink --device cpu \
		--parts memory --pictures 1 4 8 --options layers=2 --out results/memory/$$n; done

# The page in a browser, see page/README.md: built anew where what it is made of has changed.
.PHONY: page page-test
SITE := runs/page
PORT ?= 8000
page: $(SITE)/world.json
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(SITE) $(PORT)
page-test: $(SITE)/world.json
	SITE=$(SITE) $(BIN)/python -m pytest tests/page
$(SITE)/world.json: .venv/page $(wildcard *.py page/*.* page/site/*) $(SHIPPED:%=%/model.safetensors)
	$(BIN)/python -m page.export --run $(SHIPPED) --methods random cls_attention --out $(SITE)
.venv/page: page/requirements.txt | .venv/ready
	$(BIN)/python -m pip install --quiet --requirement page/requirements.txt
	touch $@

# A paper's main table on a real backbone: make paper PAPER=autoselect MODEL=llava-hf/llava-1.5-7b-hf
.PHONY: paper
paper: .venv/ready
	$(BIN)/python -m examples.headline $(PAPER) $(if $(MODEL),--model $(MODEL)) $(MORE)

# Every claim of the three papers, with seeds, and all that results/ shows: hours, and where it was
# ended the same command goes on. `python -m measure.experiments --plan` says what is left.
.PHONY: results claims shipped pictures
results: claims shipped headline cards rivals classify speed pictures
claims: .venv/ready
	$(BIN)/python -m measure.experiments
	$(BIN)/python -m measure.claims
shipped:
	rm -rf $(foreach r,headline rivals_llava rivals_qwen2_5_vl,results/$(r)/predictions)
	for m in autoselect stepprune recon; do rm -rf results/$${m}_tiny/selector; \
		cp -r runs/claims/llava/$${m}_s0/selector results/$${m}_tiny/selector; done
SEEDS := 0 1 2
pictures: .venv/ready
	$(BIN)/python -m measure.rebuild --run $(SEEDS:%=runs/claims/llava/recon_s%) --out results/recon_tiny
	$(BIN)/python -m measure.training_curves $(SEEDS:%=runs/claims/llava/epochs_1_s%) \
		$(SEEDS:%=runs/claims/llava/plain_s%) --out results/recon_tiny/collapse.png
	$(BIN)/python -m measure.training_curves $(SEEDS:%=runs/claims/llava/stepprune_s%) \
		--out results/stepprune_tiny/training.png
