#!/usr/bin/env bash
# Format, lint, types, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train,dev,pacs
export HF_HUB_OFFLINE=1
# The web UI is tested in a real browser. Without one those tests are skipped with a reason.
if ! command -v chromium > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
  (apt-get update && apt-get install -y --no-install-recommends chromium) > /dev/null 2>&1 ||
    echo "chromium could not be installed; the browser tests will be skipped"
fi
# Images are compared with those of dcmtk and ImageMagick. Without them those tests are skipped with a reason.
if ! { command -v dcm2pnm && command -v convert-im6.q16; } > /dev/null && command -v apt-get > /dev/null &&
  [ "$(id -u)" = 0 ]; then
  (apt-get update && apt-get install -y --no-install-recommends dcmtk imagemagick) > /dev/null 2>&1 ||
    echo "dcmtk and imagemagick could not be installed; the comparisons with them will be skipped"
fi
# DeepSpeed comes as source (20 seconds) and builds a kernel for CPU ranks on first use. Without it its tests are skipped.
python -c "import deepspeed" > /dev/null 2>&1 ||
  DS_BUILD_OPS=0 pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt deepspeed ||
  echo "deepspeed could not be installed; its tests will be skipped"
# llama.cpp is compiled from source, which takes minutes, so only .ci/run asks for it. Without it its tests are skipped.
# It records the flags, because `babydoctor bench peers` must not be run on this build.
# Two versions: the current one and, in a separate folder, the last one that puts CLIP's class token first.
build_llama_cpp() {
  echo "Building llama-cpp-python $1 (some minutes)"
  local flags="'-O1 -frecord-gcc-switches'"
  CMAKE_ARGS="-DCMAKE_C_FLAGS_RELEASE=$flags -DCMAKE_CXX_FLAGS_RELEASE=$flags" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    timeout 1200 pip install --quiet --disable-pip-version-check -c constraints.txt "llama-cpp-python$1" "${@:2}" ||
    echo "llama-cpp-python $1 could not be built; the tests that load it will be skipped"
}
if [ -n "${BABYDOCTOR_LLAMA_CPP:-}" ]; then
  python -c "import llama_cpp" 2> /dev/null || build_llama_cpp "[server]>=0.3.36"
  old=.venv/llama-cpp-python-0.3.8
  [ -d "$old" ] || build_llama_cpp "==0.3.8" diskcache --no-deps --target "$old"
fi
ruff check .
ruff format --check .
mypy
# Tests compute in one thread, so each core runs one file. `-n 0` runs all of them in this process.
exec python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
