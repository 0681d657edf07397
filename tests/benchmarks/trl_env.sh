#!/usr/bin/env bash
# Makes TRL's environment for the benchmark: trl_env.sh FOLDER, with the torch and transformers of PROJECT_PYTHON.
set -euo pipefail
folder=$1
own=${PROJECT_PYTHON:-.venv/bin/python}
version() { "$own" -c "import importlib.metadata as m; print(m.version('$1').split('+')[0])"; }
if "$folder/bin/python" -c "import trl.experimental.ppo" 2>/dev/null; then
    exit 0
fi
"${PYTHON:-python3}" -m venv "$folder"
# shellcheck disable=SC2086
"$folder/bin/pip" install --quiet ${PIP_ARGS:-} "torch==$(version torch)" "transformers==$(version transformers)" \
    "trl==1.12.*" accelerate datasets
