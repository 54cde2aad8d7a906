# Sourced by the other scripts: creates or reuses .venv in the checkout and installs BabyDoctor into it.
# Usage: source scripts/setup.sh EXTRAS     (for example train,dev)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
extras=${1:-train}
python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  echo "Creating .venv with $($python --version)"
  $python -m venv .venv
fi
# Skip the installation if it was done for this pyproject.toml, these constraints and these extras.
wanted="$extras $(cat pyproject.toml constraints.txt | cksum)"
stamp=.venv/.installed-$extras
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing babydoctor[$extras] into .venv (about a minute)"
  # Install the pinned torch first, so that no other package pulls a different release.
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
