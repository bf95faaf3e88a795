# make demo   the main job: real models, dense beside patched, and the undo proof (first run fetches two wheels)
# make test   lint, types, all tests          make bench  numbers under benchmarks/results/
# make aot    compile all Triton kernels for four GPU targets, write docs/kernels.md      make gpu-check  on a GPU: gate + numbers
# make docs   regenerate docs/coverage.md and the method list of the README
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint bench docs aot gpu-check testbed install clean

install: $(STAMP)

# torch is installed first and by its exact version: a range could make pip pick a CUDA build of several GB
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[eval,peft,testbed,triton,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/hf-attn-patch demo

testbed: $(STAMP)
	$(BIN)/hf-attn-patch testbed smollm2
	$(BIN)/hf-attn-patch testbed dinov2s
	$(BIN)/hf-attn-patch testbed minilm
	$(BIN)/hf-attn-patch testbed digits-vit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# one thread per process, one process per core: the tests are many small models
test: lint
	-$(MAKE) --no-print-directory testbed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $${PYTEST_WORKERS:-auto} --dist worksteal

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_attention.py --out benchmarks/results/attention-cpu.csv
	$(BIN)/python benchmarks/bench_model.py --out benchmarks/results/model-cpu.csv
	$(BIN)/hf-attn-patch eval passkey --model testbed:smollm2 --patch streaming:sinks=4,window=256 \
		--patch moa:plan=hf_attn_patch/patches/plans/smollm2-demo.json --out benchmarks/results/passkey-smollm2

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
