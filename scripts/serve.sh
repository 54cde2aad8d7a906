#!/usr/bin/env bash
# Serve a run directory: controller, workers and web UI. Arguments: RUN [key=value ...] [--workers N] [--no-page].
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec babydoctor serve "$@"
