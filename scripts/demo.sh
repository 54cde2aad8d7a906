#!/usr/bin/env bash
# Train and try the tiny preset: setup, phantoms, base models, three stages, scores, web UI. --check opens no web UI.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train
exec babydoctor demo "$@"
