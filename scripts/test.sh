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
# llama.cpp comes as source and compiles for some minutes; only .ci/run asks for it. Without it its tests are skipped.
if [ -n "${BABYDOCTOR_LLAMA_CPP:-}" ] && ! python -c "import llama_cpp" 2> /dev/null; then
  echo "Building llama-cpp-python (some minutes)"
  CMAKE_ARGS="-DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    timeout 1200 pip install --quiet --disable-pip-version-check -c constraints.txt "llama-cpp-python>=0.3.36" ||
    echo "llama-cpp-python could not be built; the tests that load llama.cpp will be skipped"
fi
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
