# make quickstart   environment, a real model, PPO on it: two CPU cores, a quarter of an hour
# make pairs        preference pairs from that model, for reward models and DPO
# make test         environment, then all tests
# make bench        side-by-side timings (needs idle cores)

PYTHON ?= python3
VENV ?= .venv
# More arguments for pip, such as an index with CPU builds of PyTorch (--extra-index-url URL).
PIP_ARGS ?=

BIN := $(VENV)/bin
RUN ?= runs/quickstart
QUICKSTART := build/quickstart
export OMP_WAIT_POLICY ?= PASSIVE
export TQDM_DISABLE ?= 1

.PHONY: install install-dev quickstart pairs test lint bench docs clean

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
$(QUICKSTART)/pairs.jsonl: $(QUICKSTART)/prompts.jsonl
	$(BIN)/rayrlhf sample configs/quickstart.yaml $@ -n 6 --prompts 400 --least-gap 0.2

pairs: $(QUICKSTART)/pairs.jsonl

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed-dev
	PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" PROJECT_PYTHON="$(BIN)/python" bash tests/benchmarks/trl_env.sh .venv-trl
	$(BIN)/python tests/benchmarks/run.py

docs: $(VENV)/installed
	$(BIN)/python -m rayrlhf.config.reference > docs/configuration.md

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
