# Sourced by the other scripts: makes or reuses .venv in the checkout and installs BabyDoctor into it.
# Usage: source scripts/setup.sh EXTRAS     (for example train,dev)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
extras=${1:-train}
python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  echo "Making .venv with $($python --version)"
  $python -m venv .venv
fi
# Installed already for this pyproject.toml, these constraints and these extras? Then there is nothing to do.
wanted="$extras $(cat pyproject.toml constraints.txt | cksum)"
stamp=.venv/.installed-$extras
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing babydoctor[$extras] into .venv (about a minute)"
  # torch first, by itself: its pinned release, so that no other package pulls a different one.
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
