# `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint matrix versions engines fuzz mutations arena arena-smoke alignment bench gpu gpu-wheels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the package with the tested versions (constraints.txt)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, e.g. make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## train a tiny language model offline with a learning λ, two CPU cores, a few minutes
	PYTHONWARNINGS=ignore::FutureWarning $(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 \
		--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 2 \
		recipes/train.py --config recipes/configs/playground.yaml

test: lint ## lint and run the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

matrix: $(STAMP) ## the same rows cut in every way give the same step; writes the table in README.md
	$(BIN)/python tests/matrix.py --write README.md

versions: $(STAMP) ## contract, parity and matrix on every tested version of TRL (REDUCED=1: the oldest, a part)
	$(BIN)/python tests/versions.py --folder .versions $(if $(REDUCED),--reduced)

engines: $(STAMP) .engines/.installed ## λ under DDP, FSDP2, ZeRO-2, ZeRO-3, and beside other optimizers, on a CPU (REDUCED=1: ZeRO-3)
	PATH="$(CURDIR)/$(BIN):$(CURDIR)/.engines/bin:$$PATH" PYTHONPATH=.engines $(BIN)/python tests/engines.py \
		$(if $(REDUCED),--only "zero3 ×2")

# Not dependencies of the package: DeepSpeed without its compiled operators, and what it imports.
.engines/.installed: $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .engines deepspeed==0.19.8 bitsandbytes==0.50.2 hjson py-cpuinfo msgpack einops ninja \
		galore-torch==1.0 apollo-torch==1.0.3 lomo-optim==0.1.1 schedulefree==1.4.1
	touch $@

fuzz: $(STAMP) ## a hundred thousand random inputs to weights.py
	TRL_LAMBDA_EXAMPLES=50000 $(BIN)/python -m pytest -q tests/test_faults.py -k any_ --hypothesis-show-statistics

mutations: $(STAMP) ## break one line at a time and see which test catches it; writes tests/MUTATIONS.md
	$(BIN)/python tests/mutations.py --write

arena: $(STAMP) ## the comparison of all aggregations, hours on two cores; goes on where it stopped
	$(BIN)/python -m recipes.arena.comparison.study tune choose main one_step
	$(BIN)/python -m recipes.arena.analysis.report

arena-smoke: $(STAMP) ## the same in small, minutes, in runs/arena_smoke
	$(BIN)/python -m recipes.arena.comparison.study tune choose main one_step --smoke
	$(BIN)/python -m recipes.arena.analysis.report --results runs/arena_smoke

alignment: $(STAMP) ## which weights point where learning goes: minutes per task; goes on where it stopped
	$(BIN)/python -m recipes.arena.alignment.study

bench: $(STAMP) ## what it costs beside GRPOTrainer: appends to recipes/bench/results.csv, writes the table in README.md
	$(BIN)/python -m recipes.bench.overhead
	$(BIN)/python -m recipes.bench.weights_alone
	$(BIN)/python -m recipes.bench.head_memory
	$(BIN)/python -m recipes.bench.two_processes
	$(BIN)/python -m recipes.bench.import_time
	$(BIN)/python -m recipes.bench.table --write recipes/bench/README.md
	$(BIN)/python -m recipes.bench.table --write README.md --overhead-only

gpu: $(if $(BARE),.gpu-site/.installed,$(STAMP)) ## all that wants a GPU, under 25 minutes (TINY=1: every line on a CPU; PARTS=; OUT=; BARE=1: no network)
	$(if $(BARE),PYTHONPATH=.gpu-site $(PYTHON),$(BIN)/python) -m recipes.bench.gpu \
		$(if $(TINY),--tiny) $(if $(PARTS),--parts $(PARTS)) $(if $(OUT),--out $(OUT))

gpu-wheels: ## what `make gpu BARE=1` needs beside torch, transformers, accelerate and peft, in .gpu-wheels (LEAN=1: without pyarrow and pandas)
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
		--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--dest .gpu-wheels --requirement recipes/bench/gpu_wheels$(if $(LEAN),_lean).txt

.gpu-site/.installed: $(wildcard .gpu-wheels/*.whl)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .gpu-site .gpu-wheels/*.whl
	touch $@

clean: ## remove .venv, caches, runs and the folders that other targets install into
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .versions .engines .gpu-site .gpu-wheels runs *.egg-info
