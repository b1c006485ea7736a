#!/usr/bin/env bash
# Make the engine's virtual environment: vLLM for the CPU and just what it imports to serve a text model offline.
#
#     install.sh VENV        # PYTHON=python3.12 install.sh VENV takes another interpreter than python3
#
# A VENV that is complete for these same inputs is kept as it is; anything less is emptied and made again.
# vLLM needs the CPU build of torch. Where the index offers a CUDA build, add the index of the CPU builds:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu install.sh VENV
set -euo pipefail

venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stamp=$venv/engine.sha256
inputs=$(cat "$here/install.sh" "$here/requirements.txt" | sha256sum)

if [ -d "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    echo "install.sh: $venv is not a virtual environment, and not empty" >&2
    exit 1
fi
mkdir -p "$venv"
exec 9<"$venv" && flock 9 # one install at a time; a killed one's pip keeps the lock until it too is gone
[ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ] && "$venv/bin/python" -c "" 2>/dev/null && exit

touch "$venv/pyvenv.cfg" # kept to the last, so that a half-made environment is known for one
find "$venv" -mindepth 1 -maxdepth 1 ! -name pyvenv.cfg -exec rm -rf {} +
"${PYTHON:-python3}" -m venv "$venv"
# The pins are complete, so nothing is left to resolve; only what is imported gets compiled, by the check below.
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --only-binary :all: --no-compile \
    --requirement "$here/requirements.txt"
PYTHONDONTWRITEBYTECODE="" "$venv/bin/python" -c "import vllm; vllm.LLM"
echo "$inputs" >"$stamp.new" && mv "$stamp.new" "$stamp"
