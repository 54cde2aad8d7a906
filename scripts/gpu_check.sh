#!/usr/bin/env bash
# Check every CUDA path and measure training and serving on this GPU, within --minutes (8).
# Needs no download and no package index. It runs with PYTHON=..., else .venv, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
exec "$PYTHON" -c "from babydoctor.cli.main import main; main()" bench gpu "$@"
