#!/usr/bin/env bash
# The tiny preset from nothing to answers: set-up, phantoms, base, three stages, score, chat. --check asks nothing.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train
exec babydoctor demo "$@"
