#!/bin/sh
# Print the path of the Python for the environment: $PYTHON if it is set, else the newest of the versions that the
# lock was resolved for. Without one: an error message and exit code 2.
#
#   environment/find_python.sh [VENV]
#
# Every candidate is run, because a name on the PATH is not enough: pyenv has shims for versions that are installed
# but not selected. Free-threaded builds are skipped: half of the locked packages have no wheel for them.
set -u

versions="3.13 3.12 3.11"
versions=${ONLY:-$versions}  # `make pythons` sets ONLY to one of them

fits() {  # PROGRAM VERSION...
  program=$1
  shift
  found=$("$program" -c '
import sys, sysconfig
if sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
  for version in "$@"; do [ "$found" = "$version" ] && return 0; done
  return 1
}

if [ -n "${PYTHON:-}" ]; then
  # shellcheck disable=SC2086  # unquoted, because every version is an argument of its own
  if fits "$PYTHON" $versions; then command -v "$PYTHON"; exit 0; fi
  echo "make: PYTHON=$PYTHON is not a CPython that the locked packages exist for. Fix: set PYTHON to one of $versions, or" \
    "leave it out to use the newest that is found." >&2
  exit 2
fi

for wanted in $versions; do
  for candidate in "python$wanted" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted".*/bin/python; do
    if fits "$candidate" "$wanted"; then command -v "$candidate"; exit 0; fi
  done
  # Pythons that uv installed are not on the PATH. Without --no-python-downloads uv would fetch one.
  candidate=$(uv python find --no-python-downloads "$wanted" 2>/dev/null) || continue
  if fits "$candidate" "$wanted"; then echo "$candidate"; exit 0; fi
done

# Last resort: the Python of the existing environment, for instance one of a conda environment that is not active.
# shellcheck disable=SC2086
if [ -n "${1:-}" ] && fits "$1/bin/python" $versions; then echo "$1/bin/python"; exit 0; fi

echo "make: No Python of the versions $versions was found (searched: python3.x and python3 on the PATH, folders of" \
  "pyenv and uv). Fix: install one (Debian and Ubuntu: apt-get install python3 python3-venv; with uv: uv python" \
  "install 3.13; with pyenv: pyenv install 3.13), or give its path: make setup PYTHON=/path/to/python3.13." >&2
exit 2
