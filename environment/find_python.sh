#!/bin/sh
# Print the path of the Python that the environment is made with: $PYTHON if it is set, else the newest of those
# that the lock was resolved for. Without one: a paragraph, exit code 2.
#
#   environment/find_python.sh [VENV]
#
# A name on the path is not enough: pyenv has shims for versions that are installed but not selected, so every
# candidate is run. Free-threaded builds are left out, since half of the locked packages have no wheel for them.
set -u

versions="3.13 3.12 3.11"
versions=${ONLY:-$versions}  # one of them, for `make pythons`

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
  # shellcheck disable=SC2086  # the versions are words
  if fits "$PYTHON" $versions; then command -v "$PYTHON"; exit 0; fi
  echo "make: PYTHON=$PYTHON is not a CPython that the locked packages exist for. Fix: name one of $versions, or" \
    "leave PYTHON out to take the newest that is found." >&2
  exit 2
fi

for wanted in $versions; do
  for candidate in "python$wanted" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted".*/bin/python; do
    if fits "$candidate" "$wanted"; then command -v "$candidate"; exit 0; fi
  done
  # Pythons that uv keeps are on no path.
  candidate=$(uv python find --no-python-downloads "$wanted" 2>/dev/null) || continue
  if fits "$candidate" "$wanted"; then echo "$candidate"; exit 0; fi
done

# The environment that is there knows its own, for instance one of conda that is not active now.
# shellcheck disable=SC2086
if [ -n "${1:-}" ] && fits "$1/bin/python" $versions; then echo "$1/bin/python"; exit 0; fi

echo "make: No Python of $versions was found (looked for python3.x and python3 on the path, in pyenv's and uv's" \
  "folders). Fix: install one (Debian and Ubuntu: apt-get install python3 python3-venv; with uv: uv python" \
  "install 3.13; with pyenv: pyenv install 3.13), or name one: make setup PYTHON=/path/to/python3.13." >&2
exit 2
