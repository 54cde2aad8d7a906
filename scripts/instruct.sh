#!/usr/bin/env bash
# Stage 2: train LoRA and projector on LLaVA-Instruct-80K. Arguments: key=value overrides, --resume. Several GPUs: ACCELERATE_CONFIG.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train
exec accelerate launch ${ACCELERATE_CONFIG:+--config_file "$ACCELERATE_CONFIG"} -m babydoctor.train configs/instruct.yaml "$@"
