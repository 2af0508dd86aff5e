# Sourced by the scripts beside it. Gives make_venv, and the folder `repository`.
repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# make_venv FOLDER: check the tools, make the environment if it is not there, pin what pip installs.
# Sets `bin`, the environment's folder of programs.
make_venv() {
  local python=${PYTHON:-python3}
  command -v "$python" >/dev/null ||
    fail "$python not found; install Python 3.10 or newer, or name one in PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old; name Python 3.10 or newer in PYTHON"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; install it (Debian: apt-get install python3-venv)"
  command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++ compiler; install one (Debian: apt-get install g++) or name it in CXX"

  bin=$1/bin
  # An interrupted run can leave a folder without pip behind.
  if ! "$bin/python" -m pip --version >/dev/null 2>&1; then
    echo "making the environment $1" >&2
    "$python" -m venv --clear "$1" || fail "cannot make the environment $1"
  fi
  # The build environment too is pinned, whichever variable this pip reads for it.
  export PIP_CONSTRAINT=$repository/constraints.txt
  export PIP_BUILD_CONSTRAINT=$PIP_CONSTRAINT
  export PIP_DISABLE_PIP_VERSION_CHECK=1
}

# pip_install ARGUMENTS: quiet, but for what goes wrong.
pip_install() {
  echo "installing: $*" >&2
  "$bin/python" -m pip install --quiet "$@" || fail "pip could not install $*"
}
