#!/usr/bin/env bash
# Builds the sdist, and from it a wheel with a compiler and one without; installs each into a venv
# that has nothing else than what sparseworks depends on, and uses it there.
#   scripts/check_wheel.sh [OUT] [KINDS]
# OUT     where sdist and wheel stay (default: dist)
# KINDS   "with" a compiler, which takes minutes, "without", or both (default: "with without")
# PYTHON  interpreter with torch, build and the dependencies (default: .venv/bin/python): the venvs
#         get links to what it has, so that no second torch is fetched
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
out=${1:-dist}
kinds=${2:-with without}
python=$(command -v "${PYTHON:-.venv/bin/python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
say() { printf 'check_wheel: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH SPARSEWORKS_ISA

say "sdist"
mkdir -p "$out"
"$python" -m build --sdist -o "$work/sdist" . >"$work/log" 2>&1 || { cat "$work/log"; fail "no sdist"; }
sdist=$(echo "$work"/sdist/*.tar.gz)
tar tzf "$sdist" | sed 's|^[^/]*/||' >"$work/names"
odd=$(grep -Ev '^$|^(src|native)(/|$)|^(CMakeLists.txt|pyproject.toml|README.md|LICENSE|CHANGELOG.md|PKG-INFO|\.gitignore)$' "$work/names" || true)
[ -z "$odd" ] || fail "the sdist holds what no installation needs: $odd"
binary=$(grep -E '\.(so|pyc|parquet|safetensors|npy|npz|zip|png|svg)$' "$work/names" || true)
[ -z "$binary" ] || fail "the sdist holds binaries: $binary"
for needed in CMakeLists.txt native/module.cpp src/sparseworks/py.typed \
  src/sparseworks/diagnostics/results.json LICENSE; do
  grep -qx "$needed" "$work/names" || fail "the sdist lacks $needed"
done

# wheel KIND: what pip makes of the sdist, and not of what it kept of an earlier time
wheel() {
  say "wheel $1 a compiler"
  mkdir "$work/$1"
  "$python" -m pip --disable-pip-version-check wheel --no-deps --no-cache-dir \
    -w "$work/$1" "$sdist" \
    >"$work/log" 2>&1 || { tail -40 "$work/log"; fail "no wheel $1 a compiler"; }
}

# use KIND BUILT: install the wheel and use it, far from the checkout
use() {
  say "the wheel $1 a compiler in a bare venv"
  local venv=$work/venv-$1
  "$python" -m venv --without-pip "$venv"
  "$python" scripts/bare_venv.py "$venv" "$work/$1"/*.whl
  (cd "$work" && "$venv/bin/python" -I "$here/scripts/use_wheel.py" "$2")
}

for kind in $kinds; do
  case $kind in
    with)
      wheel with
      unzip -l "$work"/with/*.whl | awk '{print $4}' >"$work/names"
      grep -q '_native.*\.so$' "$work/names" \
        || fail "the wheel has no native module: was there a compiler?"
      odd=$(grep -E '^(tests|claims|benchmarks|native|docs|scripts)/' "$work/names" || true)
      [ -z "$odd" ] || fail "the wheel holds $odd"
      use with built
      cp "$work"/with/*.whl "$out"
      ;;
    without)
      CC=/bin/false CXX=/bin/false wheel without
      use without torch
      ;;
    *) fail "KINDS: with, without, or both" ;;
  esac
done
cp "$sdist" "$out"
say "sound"
