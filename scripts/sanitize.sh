#!/usr/bin/env bash
# Builds the native kernels with AddressSanitizer and UBSan and runs their tests; the build that is
# in the source tree stays as it is.
#   scripts/sanitize.sh [PYTEST ARGUMENTS]
# PYTHON  interpreter with the test extras, nanobind and cmake (default: .venv/bin/python)
# CXX     compiler (default: g++)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-.venv/bin/python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
export CXX=${CXX:-g++}
build=build/sanitize

PATH=$(dirname "$python"):$PATH
cmake -S . -B $build -DPython_EXECUTABLE="$python" -DSPARSEWORKS_SANITIZE=ON >/dev/null
cmake --build $build

# the package as links, with the sanitized module in its place
rm -rf $build/package
mkdir -p $build/package
cp -rs "$PWD/src/sparseworks" $build/package/
rm -f $build/package/sparseworks/kernels/_native*
cp $build/_native*.so $build/package/sparseworks/kernels/
# an editable installation would import the package that it stands for, whatever the path says
cat >$build/package/sitecustomize.py <<'EOF'
import sys

sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
EOF

# the runtimes must come first; without libstdc++ beside them no exception could be thrown
preload=
for library in libasan.so libubsan.so libstdc++.so; do
  preload="$preload $("$CXX" -print-file-name=$library)"
done
if [ $# -eq 0 ]; then set -- tests/kernels tests/engine/test_{program,products,bands,rules,int8,decoder}.py; fi
# leaks: Python and torch keep much until the end
sanitized() {
  env LD_PRELOAD="${preload# }" PYTHONMALLOC=malloc PYTHONPATH="$PWD/$build/package" \
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:"${ASAN_OPTIONS:-}" \
    UBSAN_OPTIONS=print_stacktrace=1:"${UBSAN_OPTIONS:-}" \
    "$python" "$@"
}
sanitized - <<EOF
from sparseworks.kernels.native import module

if not module().__file__.startswith("$PWD/$build/"):
    raise SystemExit(f"sanitize: {module().__file__} is imported, not what was built here")
EOF
sanitized -m pytest -p no:cacheprovider -q "$@"
