# Sourced by demo.sh and test.sh, from the repository root: makes .venv with agsel and all that its tests need, once for
# each state of pyproject.toml and constraints.txt, and activates it. PYTHON names the interpreter to make it with.

install_agsel() {
  local python=${PYTHON:-python3} pip="python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: agsel needs Python 3.11 or newer, $python is older (set PYTHON)" >&2
    return 1
  fi
  echo "setup: installing agsel into .venv (a few minutes, once)"
  "$python" -m venv --clear .venv && source .venv/bin/activate || return 1
  # torch first: deepspeed's build imports it, and its pinned version decides which build everything else gets.
  $pip torch setuptools wheel ninja || return 1
  DS_BUILD_OPS=0 $pip --no-build-isolation deepspeed || return 1
  $pip --no-build-isolation --editable '.[test]' || return 1
}

stamp=.venv/installed-$(cat pyproject.toml tools/constraints.txt | cksum | cut -d' ' -f1)
if [ -f "$stamp" ]; then
  source .venv/bin/activate
else
  install_agsel || { echo "setup: installation failed" >&2; exit 1; }
  touch "$stamp"
fi
# A run killed while DeepSpeed compiles leaves a lock behind: a folder of its own keeps it from hanging other projects.
export TORCH_EXTENSIONS_DIR="$PWD/.cache/torch_extensions"
