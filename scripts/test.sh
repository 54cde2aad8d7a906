#!/usr/bin/env bash
# Format, lint, types, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train,dev
export HF_HUB_OFFLINE=1
# The page is tested in a real browser; without it those tests are skipped with a reason.
if ! command -v chromium > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
  (apt-get update && apt-get install -y --no-install-recommends chromium) > /dev/null 2>&1 ||
    echo "chromium could not be installed; the browser tests will be skipped"
fi
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
