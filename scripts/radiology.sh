#!/usr/bin/env bash
# Stage 3: train 4-bit QLoRA and projector on roco-instruct-65k. Arguments: key=value overrides, --resume. Several GPUs: ACCELERATE_CONFIG.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train
exec accelerate launch ${ACCELERATE_CONFIG:+--config_file "$ACCELERATE_CONFIG"} -m babydoctor.train configs/radiology.yaml "$@"
