# Every job of this repository is a target here; CI calls the same ones.

# PYTHON makes .venv, and runs gpu-check where there is none.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
GPU_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))
# Only losses and an optimizer of theirs are used, which need little of what they bring along.
PEERS := 'lightly>=1.5.20' pytorch-metric-learning
# Those that a CPU can run.
BENCHMARKS := loss optimizer augment step roofline digits
RENDER := $(BIN)/python -m benchmarks.render
# Built beside torch, which its own environment for building would lack.
DEEPSPEED := deepspeed==0.19.8
DEEPSPEED_NEEDS := wheel setuptools py-cpuinfo hjson msgpack einops tqdm psutil ninja packaging
# Without the decoders of video and the like that it brings, a gigabyte of them; six and packaging are there.
DALI := nvidia-dali-cuda130==2.4.0
DALI_NEEDS := 'astunparse<=1.6.3' 'gast<=0.7.0' makefun nvtx optree
DEMO := runs/digits
CIFAR10 ?= data/cifar10
# Processes that share the fast tests; 0: none but pytest's own.
WORKERS ?= 2
# Their tensors are small: a second thread mostly waits, and takes a core from the other process.
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup dali demo check lint test fix storm storm-ranks storm-slurm storm-pack scaling bench bench-docs docs gpu-check gpu-glance gpu-proof gpu-networks gpu-sweep gpu-input gpu-cifar clean

help: ## Print this table
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install the package with its tools; redone when pyproject.toml changes

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(None if sys.version_info >= (3, 11) \
	  else "bigsimclr needs Python 3.11 or newer and this is " + v + "; name another: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	  echo "no .venv could be made; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "torch==$(TORCH)" > $(VENV)/constraints.txt
	@echo "setup: installing torch $(TORCH), then the rest into $(VENV)"
	@$(INSTALL) 'torch==$(TORCH)'
	@$(INSTALL) --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@$(INSTALL) --constraint $(VENV)/constraints.txt $(DEEPSPEED_NEEDS)
	@DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation --no-deps $(DEEPSPEED)
	@touch $@

dali: setup ## Add NVIDIA DALI, 200 MB, for the tests of its decoder on the CPU
	@$(INSTALL) --constraint $(VENV)/constraints.txt $(DALI_NEEDS)
	@$(INSTALL) --no-deps $(DALI) nvidia-nvimgcodec-cu13==0.9.0.20

demo: setup ## Run the whole chain on real digits: pretrain, fine-tune, distil, report
	@$(BIN)/bigsimclr run digits --out $(DEMO)
	@echo "open this in a browser: $(CURDIR)/$(DEMO)/report.html"

check: lint ## Lint, types, import rules and the fast tests
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not long and not gpu"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# One after the other: these start processes of their own, and wait for them so many seconds.
test: check ## Everything CI runs: check, and all tests but those of minutes or a GPU
	@$(BIN)/python -m pytest -q -m "slow and not gpu and not long"

fix: setup ## Repair what ruff can repair, and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

storm: setup ## Kill and stop a tiny run many times and compare its weights with an undisturbed run
	@$(BIN)/python -m benchmarks.storm --kills 20 --terms 20 -o benchmarks/results/storm.json

storm-ranks: setup ## The long tests of several ranks; then kill and freeze single ones of 2, 3 and 4
	@$(BIN)/python -m pytest -q -m "long and not gpu"
	@$(BIN)/python -m benchmarks.storm_ranks --kills 20 --stops 7 -o benchmarks/results/storm_ranks.json

storm-slurm: setup ## A real Slurm on this machine: preempt, requeue, cancel jobs, lose nodes; compare weights
	@$(BIN)/python -m pytest -q -m "slow and not gpu" tests/launch/test_slurm.py tests/launch/test_slurm_names.py
	@$(BIN)/python -m benchmarks.storm_slurm --events 42 --clusters 2 --steps 1000 -o benchmarks/results/storm_slurm.json

storm-pack: setup ## Pack 60,000 images of CIFAR-10 while being killed ten times; nothing is lost or doubled
	@$(BIN)/python -m pytest -q -m "slow or long" tests/data/test_pack.py

scaling: setup ## Throughput on 1, 2, ... ranks of this machine; a model of many GPUs beside it
	@$(BIN)/python -m benchmarks.scaling -o benchmarks/results/scaling.json
	@$(RENDER) > /dev/null

bench: setup ## Time and memory of the parts beside others' on a CPU; the digits pipeline; then bench-docs
	@$(INSTALL) --no-deps $(PEERS)
	@set -e; for name in $(BENCHMARKS); do \
	  echo "bench: $$name"; $(BIN)/python -m benchmarks.$$name --output benchmarks/results/$$name.json; \
	done
	@$(RENDER)

bench-docs: setup ## Write docs/benchmarks.md and docs/performance.md from benchmarks/results
	@$(RENDER) > /dev/null

docs: bench-docs ## Write docs/recipes.md again from the recipe schema, and the pages of bench-docs
	@$(BIN)/bigsimclr explain --all --markdown > docs/recipes.md.new
	@mv docs/recipes.md.new docs/recipes.md

gpu-check: ## Tests that need a GPU, then its benchmarks, in nine minutes; uses PYTHON where there is no .venv
	@$(GPU_PYTHON) -m benchmarks.gpu_check

gpu-glance: ## A first look: most targets of a GPU in a minute
	@$(GPU_PYTHON) -m benchmarks.glance -o benchmarks/results/glance-gpu.json

gpu-proof: ## Golden tests, loss curves, memory and races under the sanitizer, plain PyTorch; nine minutes of a GPU
	@$(GPU_PYTHON) -m benchmarks.gpu_check proof

gpu-networks: ## Five networks beside the other loops, time by class of kernels; nine minutes of a GPU
	@$(GPU_PYTHON) -m benchmarks.gpu_check networks

gpu-sweep: ## Every kernel with other tiles, warps and stages; a few minutes of a GPU
	@$(GPU_PYTHON) -m benchmarks.gpu_check sweep

gpu-input: ## Decoding by a GPU's hardware, and training fed by it; reads the folder or shards `photographs`
	@$(GPU_PYTHON) -m benchmarks.gpu_check input

gpu-cifar: ## CIFAR-10 in nine minutes of one GPU: the label-efficiency table; CIFAR10=DIR has the parquet files
	@$(GPU_PYTHON) -m benchmarks.cifar10 --data $(CIFAR10) --minutes 9 --output benchmarks/results/cifar10.json

clean: ## Remove .venv, caches and build results; runs/ stays
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
