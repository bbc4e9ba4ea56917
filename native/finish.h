// What products do beside multiplying: store results, and fetch weights ahead.
#pragma once

#include <cstring>

#include "bf16.h"
#include "math.h"

namespace sparseworks {
namespace {

// What is fetched into the second cache meanwhile: `lines` cache lines a step, from `at`.
struct Ahead {
  const char* at;
  int lines;
  void fetch() {
    for (int i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// y = activation(sum + bias + residual) for up to 16 rows of one token.
template <Activation A, typename T>
inline void finish(const float* sum, const float* bias, const T* residual, T* y, int rows) {
  Vec v = load(sum);
  if (rows == kLanes) {
    if (bias != nullptr) v += load(bias);
    if (residual != nullptr) v += load(residual);
    return store(y, activate<A>(v));
  }
  alignas(64) float part[kLanes] = {};
  alignas(64) T other[kLanes] = {};
  if (bias != nullptr) std::memcpy(part, bias, rows * sizeof *bias);
  if (residual != nullptr) std::memcpy(other, residual, rows * sizeof *residual);
  store(other, activate<A>(v + load(part) + load(other)));
  std::memcpy(y, other, rows * sizeof *y);
}

}  // namespace
}  // namespace sparseworks
