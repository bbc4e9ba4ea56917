#!/usr/bin/env bash
# Compiles the kernels for 64-bit Arm (NEON) and runs programs under qemu's emulator.
# CXX  cross compiler (default: aarch64-linux-gnu-g++); RUN  emulator (default: qemu-aarch64)
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build/arm
sources="native/pool.cpp native/program.cpp native/dispatch.cpp"
for op in ops spmv gathered block nm zeroing selection elimination; do sources="$sources $(ls native/${op}_*.cpp | grep -v _module)"; done
sources="$sources $(ls native/decoder/step_*.cpp)"
"${CXX:-aarch64-linux-gnu-g++}" -std=c++17 -O2 -fno-math-errno -Wno-psabi -static -pthread -Inative \
  tests/native/programs.cpp $sources -o build/arm/programs
${RUN:-qemu-aarch64} build/arm/programs
