// A panel of a matrix times one vector: 16 sums.
#pragma once

#include "widen_avx2_impl.h"

namespace sparseworks {
namespace {

// What products read of an input, beside `value`.
enum class Integers {
  kNone,
  kBytes,  // high and low, moved by 128 each
  kWhole,  // of 16 bits: even columns in `high`, odd ones in `low`
};
#if defined(__AVX512VBMI2__)
constexpr Integers kIntegers = Integers::kBytes;
#elif defined(__AVX2__)
constexpr Integers kIntegers = Integers::kWhole;
#else
constexpr Integers kIntegers = Integers::kNone;
#endif

constexpr float kMiddle = 128.0f * 256.0f + 128.0f;  // of an Input's integers

// Through floats; serves every processor.
inline Vec panel_plainly(const Matrix& m, int panel, const Input& x) {
  alignas(64) float wide[kWidest * kPanel];
  Stream from(m, panel);
  Vec sum[4] = {};
  for (int c = 0; c < m.padded(); c += m.group) {
    widen_plainly(m, from, wide);
    for (int i = 0; i < m.group; i += 4)
      for (int k = 0; k < 4; ++k) sum[k] += load(wide + (i + k) * kPanel) * x.value[c + i + k];
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace
}  // namespace sparseworks

#if defined(__AVX512VBMI2__)
#include "vector_avx512_impl.h"
#elif defined(__AVX2__)
#include "vector_avx2_impl.h"
#endif

namespace sparseworks {
namespace {

#if !defined(__AVX2__)

template <int T>
inline void panel_product(const Matrix& m, int panel, const Input* x, Vec* y) {
  for (int t = 0; t < T; ++t) y[t] = panel_plainly(m, panel, x[t]);
}

#endif

inline Vec panel_product(const Matrix& m, int panel, const Input& x) {
  Vec y;
  panel_product<1>(m, panel, &x, &y);
  return y;
}

// Of `count` vectors, as many as possible at a time.
inline void panel_products(const Matrix& m, int panel, const Input* x, int count, Vec* y) {
  int t = 0;
  for (; t + 8 <= count; t += 8) panel_product<8>(m, panel, x + t, y + t);
  for (; t + 4 <= count; t += 4) panel_product<4>(m, panel, x + t, y + t);
  for (; t + 2 <= count; t += 2) panel_product<2>(m, panel, x + t, y + t);
  if (t < count) panel_product<1>(m, panel, x + t, y + t);
}

}  // namespace
}  // namespace sparseworks
