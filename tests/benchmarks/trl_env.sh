#!/usr/bin/env bash
# Makes one of TRL's environments for the benchmarks, with the torch and transformers of PROJECT_PYTHON:
#
#   trl_env.sh FOLDER [VERSION]
#
# 1.12 (the default) is the last version with PPO, 1.16 is what SFT, the reward model and DPO are compared with.
set -euo pipefail
folder=$1
wanted=${2:-1.12}
own=${PROJECT_PYTHON:-.venv/bin/python}
version() { "$own" -c "import importlib.metadata as m; print(m.version('$1').split('+')[0])"; }
if "$folder/bin/python" -c "import trl; assert trl.__version__.startswith('$wanted.')" 2>/dev/null; then
    exit 0
fi
"${PYTHON:-python3}" -m venv "$folder"
# shellcheck disable=SC2086
"$folder/bin/pip" install --quiet ${PIP_ARGS:-} "torch==$(version torch)" "transformers==$(version transformers)" \
    "trl==$wanted.*" accelerate datasets
