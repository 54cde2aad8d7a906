#!/usr/bin/env bash
# Run every command on random weights in the published layouts. Arguments: --size golden|wide|7b, --only STEP, --keep DIR.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train,dev
exec babydoctor bench rehearse "$@"
