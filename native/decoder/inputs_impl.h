// What products read: norms, and vectors as integers or bf16.
#pragma once

#include <algorithm>
#include <cmath>

#include "../bf16.h"
#include "batch_impl.h"
#include "model.h"
#include "vector_impl.h"

namespace sparseworks {
namespace {

// y = norm(x); y may be x.
inline void normalize(const Norm& norm, const float* x, float* y, int size) {
  if (norm.kind == NormKind::kNone) {
    if (y != x) std::copy(x, x + size, y);
    return;
  }
  const int whole = size / kLanes * kLanes;
  const auto total = [&](auto&& term) {
    Vec sum{};
    for (int i = 0; i < whole; i += kLanes) sum += term(load(x + i));
    float found = 0;
    for (int i = 0; i < kLanes; ++i) found += sum[i];
    for (int i = whole; i < size; ++i) found += term(all(x[i]))[0];
    return found;
  };
  const bool centred = norm.kind == NormKind::kLayer;
  const float mean = centred ? total([](Vec v) { return v; }) / static_cast<float>(size) : 0.0f;
  const float square = total([&](Vec v) { return (v - mean) * (v - mean); });
  const float scale = 1.0f / std::sqrt(square / static_cast<float>(size) + norm.eps);
  for (int i = 0; i < size; ++i) {
    const float v = (x[i] - mean) * scale * (norm.weight ? norm.weight[i] : 1.0f);
    y[i] = v + (norm.bias ? norm.bias[i] : 0.0f);
  }
}

// Memory for the vectors of a step: of each, floats and what is made of them.
struct Vectors {
  int64_t stride = 0;  // numbers; more than a multiple of 4096 bytes, which share one set of a cache
  float* value = nullptr;
  uint16_t* half = nullptr;
  uint8_t* high = nullptr;
  uint8_t* low = nullptr;
  float* sums = nullptr;
  float* unit = nullptr;

  static int64_t stride_for(int columns) { return (columns + kWidest - 1) / kWidest * kWidest + 32; }

  Input input(int row) const {
    return {value + row * stride, high + row * stride, low + row * stride,
            sums + row * stride / 16, unit[row]};
  }
  Batch batch(int tokens) const { return {(tokens + kTokens - 1) / kTokens * kTokens, stride, value, half}; }
};

// Integers of 16 bits, unit = max |x| / 32639, in two bytes moved by 128 each.
inline void make_integers(const Vectors& v, int row, int columns, bool with_sums) {
  const float* x = v.value + row * v.stride;
  uint8_t *high = v.high + row * v.stride, *low = v.low + row * v.stride;
  Vec most{};
  for (int i = 0; i < columns; i += kLanes) most = maximum(most, absolute(load(x + i)));
  float top = 0;
  for (int i = 0; i < kLanes; ++i) top = std::max(top, most[i]);
  // 127 * 256 + 127 is the largest that the two bytes hold
  const float steps = top > 1e-30f ? 32639.0f / top : 0.0f;
  v.unit[row] = top / 32639.0f;
  for (int i = 0; i < columns; i += kLanes) {
    const Vec scaled = load(x + i) * steps + 12582912.0f;  // rounds to nearest in the low bits
    const IntVec n = reinterpret_cast<IntVec>(scaled) - 0x4b400000 + static_cast<int>(kMiddle);
    typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
    *reinterpret_cast<Bytes*>(high + i) = __builtin_convertvector(n >> 8, Bytes);
    *reinterpret_cast<Bytes*>(low + i) = __builtin_convertvector(n & 255, Bytes);
    if (with_sums) {
      int sum = 0;
      for (int j = 0; j < kLanes; ++j) sum += n[j];
      v.sums[row * v.stride / 16 + i / kLanes] = static_cast<float>(sum);
    }
  }
}

// What a product with `m` reads beside the floats of a row; those beyond its columns are zero.
inline void make_ready(const Matrix& m, const Vectors& v, int row, bool many) {
  const int padded = (m.columns + kWidest - 1) / kWidest * kWidest;
  float* x = v.value + row * v.stride;
  std::fill(x + m.columns, x + padded, 0.0f);
  if (many && takes_half(m)) {
    for (int i = 0; i < padded; i += kLanes) store(v.half + row * v.stride + i, load(x + i));
  } else if (!many && kIntegers && m.integers()) {
    make_integers(v, row, padded, m.zeros);
  }
}

}  // namespace
}  // namespace sparseworks
