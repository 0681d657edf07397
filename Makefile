# make quickstart   environment, a real model, PPO on it: two CPU cores, a quarter of an hour
# make pairs        preference pairs from that model, for reward models and DPO
# make pipeline     SFT, pairs, reward model, PPO and DPO, and the comparison: under 20 minutes
# make test         environment, then all tests
# make bench        side-by-side timings (needs idle cores)

PYTHON ?= python3
VENV ?= .venv
# More arguments for pip, such as an index with CPU builds of PyTorch (--extra-index-url URL).
PIP_ARGS ?=
# Processes of the test suite: much of a test's time is waiting for others to come up.
WORKERS ?= 3

BIN := $(VENV)/bin
RUN ?= runs/quickstart
QUICKSTART := build/quickstart
export OMP_WAIT_POLICY ?= PASSIVE
export TQDM_DISABLE ?= 1

.PHONY: install install-dev quickstart pairs pipeline test lint bench docs clean

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(VENV)/installed: launch/install_cpu.sh pyproject.toml
	PYTHON="$(PYTHON)" VENV="$(VENV)" PIP_ARGS="$(PIP_ARGS)" bash launch/install_cpu.sh
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	PYTHON="$(PYTHON)" VENV="$(VENV)" PIP_ARGS="$(PIP_ARGS)" bash launch/install_cpu.sh dev
	touch $@

$(QUICKSTART)/prompts.jsonl: $(VENV)/installed examples/prepare_quickstart.py
	$(BIN)/python examples/prepare_quickstart.py $(QUICKSTART)

quickstart: $(QUICKSTART)/prompts.jsonl
	$(BIN)/rayrlhf train configs/quickstart.yaml run_dir=$(RUN)

# Preference pairs of the quickstart's model (sampled and ranked by the reward): for configs/dpo_local.yaml and others.
$(QUICKSTART)/pairs/data.jsonl: $(QUICKSTART)/prompts.jsonl
	$(BIN)/rayrlhf sample configs/pairs_local.yaml run_dir=$(@D)

pairs: $(QUICKSTART)/pairs/data.jsonl

# Every tenth fact to learn from, and others to compare on: the facts are sorted, so that any run of them is alike.
$(QUICKSTART)/held_out.jsonl: $(QUICKSTART)/prompts.jsonl
	awk 'NR % 10 == 1' $< > $(QUICKSTART)/training.jsonl
	awk 'NR % 40 == 5' $< > $@

# Facts behind those that the configurations of single runs train on.
$(QUICKSTART)/unseen.jsonl: $(QUICKSTART)/prompts.jsonl
	awk 'NR > 800 && NR % 20 == 0' $< > $@

pipeline: $(QUICKSTART)/held_out.jsonl
	$(BIN)/rayrlhf pipeline configs/pipeline_local.yaml

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# How idle threads wait is left to each contender.
bench: $(VENV)/installed-dev
	PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" PROJECT_PYTHON="$(BIN)/python" bash tests/benchmarks/trl_env.sh .venv-trl
	PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" PROJECT_PYTHON="$(BIN)/python" bash tests/benchmarks/trl_env.sh .venv-trl-1.16 1.16
	env -u OMP_WAIT_POLICY $(BIN)/python tests/benchmarks/run.py
	env -u OMP_WAIT_POLICY $(BIN)/python tests/benchmarks/run_examples.py
	$(BIN)/python -m tests.benchmarks.driver_cost --samples 1000000
	$(BIN)/python tests/benchmarks/weights.py

docs: $(VENV)/installed
	$(BIN)/python -m rayrlhf.config.reference > docs/configuration.md

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
