#!/usr/bin/env bash
# Makes .venv with everything that `make demo` or `make test` needs; does nothing when it is there.
#   scripts/setup.sh [EXTRAS]      EXTRAS: demo, test or docs (default: demo)
# PYTHON      interpreter (default: python3)
# TORCH_SPEC  what to install first (default: torch==2.13.0)
# TORCH_INDEX index for it, e.g. https://download.pytorch.org/whl/cpu: the default Linux wheel
#             carries CUDA, several gigabytes
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-demo}
python=${PYTHON:-python3}
torch_spec=${TORCH_SPEC:-torch==2.13.0}
stamp=.venv/.sparseworks-$extras
say() { printf 'setup: %s\n' "$*" >&2; }

wanted=$(git ls-files -s pyproject.toml scripts/setup.sh CMakeLists.txt native 2>/dev/null | cksum;
         cksum < pyproject.toml)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

command -v "$python" >/dev/null || { say "no $python found; install Python 3.11 or newer"; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { say "$("$python" --version) is too old; Python 3.11 or newer is needed (set PYTHON)"; exit 1; }
"$python" -c 'import venv, ensurepip' 2>/dev/null \
  || { say "the venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
free_mb=$(df -Pm . | awk 'NR==2 {print $4}')
if [ "$free_mb" -lt 4000 ]; then
  say "only $free_mb MB of disk are free here; about 4000 MB are needed"; exit 1
fi
command -v "${CXX:-c++}" >/dev/null \
  || say "no C++ compiler found: the native kernels are left out, torch serves instead (install g++)"

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  say "installing $torch_spec"
  pip install --quiet "$torch_spec" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
fi
# later installs must not replace the torch that is there
.venv/bin/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > .venv/constraints.txt
say "installing sparseworks[$extras]"
pip install --quiet -c .venv/constraints.txt -e ".[$extras]"
printf '%s' "$wanted" > "$stamp"
