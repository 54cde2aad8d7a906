#!/usr/bin/env bash
# Stage 1: train the projector on LCS-558K. Arguments: key=value overrides, --resume. Several GPUs: ACCELERATE_CONFIG.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train
exec accelerate launch ${ACCELERATE_CONFIG:+--config_file "$ACCELERATE_CONFIG"} -m babydoctor.train configs/align.yaml "$@"
