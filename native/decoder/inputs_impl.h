// What products read: norms, and vectors as integers or bf16.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "../bf16.h"
#include "batch_impl.h"
#include "columns_impl.h"
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
    float found = sum_of(sum);
    for (int i = whole; i < size; ++i) found += first(term(all(x[i])));
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
  int32_t* column = nullptr;
  int32_t* start = nullptr;

  static int64_t stride_for(int columns) { return (columns + kWidest - 1) / kWidest * kWidest + 32; }

  Input input(int row) const {
    return {value + row * stride, high + row * stride, low + row * stride,
            sums + row * stride / 16, unit[row], column + row * stride, start + row * stride};
  }
  Batch batch(int tokens) const { return {(tokens + kTokens - 1) / kTokens * kTokens, stride, value, half}; }
};

inline float largest(const float* x, int columns) {
  Vec most{};
  for (int i = 0; i < columns; i += kLanes) most = maximum(most, absolute(load(x + i)));
  return std::max(0.0f, largest_of(most));
}

// Integers of 16 bits, unit = max |x| / 32639, as `kIntegers` says.
inline void make_integers(const Vectors& v, int row, int columns, bool with_sums) {
  constexpr bool kWhole = kIntegers == Integers::kWhole;
  const float* x = v.value + row * v.stride;
  uint8_t *high = v.high + row * v.stride, *low = v.low + row * v.stride;
  const float top = largest(x, columns);
  // 127 * 256 + 127 is the largest that the two bytes hold
  const float steps = top > 1e-30f ? 32639.0f / top : 0.0f;
  v.unit[row] = top / 32639.0f;
  for (int i = 0; i < columns; i += kLanes) {
    const Vec scaled = load(x + i) * steps + 12582912.0f;  // rounds to nearest in the low bits
    const IntVec n = as<IntVec>(scaled) - 0x4b400000 + (kWhole ? 0 : static_cast<int>(kMiddle));
    if constexpr (kWhole) {
      int16_t q[kLanes], even[kLanes / 2], odd[kLanes / 2];
      stored(q, converted<Numbers<int16_t, kLanes>>(n));
      for (int j = 0; j < kLanes / 2; ++j) even[j] = q[2 * j], odd[j] = q[2 * j + 1];
      std::memcpy(high + i, even, sizeof even);
      std::memcpy(low + i, odd, sizeof odd);
    } else {
      using Bytes = Numbers<uint8_t, kLanes>;
      stored(high + i, converted<Bytes>(n >> 8));
      stored(low + i, converted<Bytes>(n & 255));
    }
    if (with_sums) {
      int32_t at[kLanes];
      stored(at, n);
      const int sum = std::accumulate(at, at + kLanes, 0);
      v.sums[row * v.stride / 16 + i / kLanes] = static_cast<float>(sum);
    }
  }
}

// The entries that are not zero, for a matrix whose columns are gathered.
inline void make_list(const Matrix& m, const Vectors& v, int row) {
  const int64_t first = row * v.stride;
  const float* x = v.value + first;
  uint8_t *high = v.high + first, *low = v.low + first;
  int32_t *column = v.column + first, *start = v.start + first;
  const float top = largest(x, m.padded());
  const float steps = top > 1e-30f ? 32639.0f / top : 0.0f;
  v.unit[row] = top / 32639.0f;
  int n = 0;
  for (int g = 0; g < m.padded() / m.group; ++g) {
    start[g] = n;
    int sum = 0;
#if defined(__AVX512VBMI2__)
    for (int c = g * m.group; c < (g + 1) * m.group; c += 16) {
      const __m512 v = _mm512_loadu_ps(x + c);
      const __mmask16 live = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(steps)));
      const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      const auto put = [&](__m512i bytes, uint8_t* to) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm_maskz_compress_epi8(live, _mm512_cvtepi32_epi8(bytes)));
      };
      put(h, high + n);
      put(q, low + n);
      const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(c), _mm512_setr_epi32(
          0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      _mm512_storeu_si512(column + n, _mm512_maskz_compress_epi32(live, at));
      sum += _mm512_mask_reduce_add_epi32(live, q);
      n += __builtin_popcount(live);
    }
#else
    for (int c = g * m.group; c < (g + 1) * m.group; ++c) {  // which ones count cannot be guessed
      const int q = static_cast<int>(std::lrintf(x[c] * steps)), h = (q + 128) >> 8;
      column[n] = c;
      high[n] = static_cast<uint8_t>(h);
      low[n] = static_cast<uint8_t>(q - 256 * h);
      sum += q;
      n += x[c] != 0;
    }
#endif
    for (; n % 4 != 0; ++n) {  // an entry that is there, times 0
      column[n] = column[start[g]];
      high[n] = low[n] = 0;
    }
    v.sums[first / 16 + g] = static_cast<float>(sum);
  }
  start[m.padded() / m.group] = n;
}

// Scores of inputs: |x| weight.
inline void make_scores(const float* weight, const float* x, int columns, float* scores) {
  if (weight)
    for (int i = 0; i < columns; ++i) scores[i] = std::fabs(x[i]) * weight[i];
  else
    for (int i = 0; i < columns; ++i) scores[i] = std::fabs(x[i]);
}

// Zeros for the inputs that do not count. Without branches: which ones count cannot be guessed.
inline void keep_active(const Active& active, float* __restrict x, int columns,
                        std::vector<float>& memory) {
  memory.resize(static_cast<size_t>(2 * columns));
  float* __restrict const score = memory.data();
  make_scores(active.weight, x, columns, score);
  const float threshold = active.threshold;
  if (threshold >= 0)
    for (int i = 0; i < columns; ++i) x[i] = score[i] > threshold ? x[i] : 0.0f;
  if (active.keep == 0 || active.keep >= columns) return;
  if (threshold >= 0) make_scores(active.weight, x, columns, score);
  float* const sorted = score + columns;
  std::copy(score, score + columns, sorted);
  std::nth_element(sorted, sorted + (active.keep - 1), sorted + columns, std::greater<>());
  const float least = sorted[active.keep - 1];
  int same = active.keep;  // of those at the limit the first ones
  for (int i = 0; i < columns; ++i) same -= score[i] > least;
  for (int i = 0; i < columns; ++i) {
    if (score[i] > least || (score[i] == least && same-- > 0)) continue;
    x[i] = 0;
  }
}

// What a product with a matrix reads beside the floats of a row; those beyond its columns are zero.
inline void make_ready(const Linear& linear, const Vectors& v, int row, bool many) {
  const Matrix& m = linear.weight;
  const int padded = (m.columns + kWidest - 1) / kWidest * kWidest;
  float* x = v.value + row * v.stride;
  std::fill(x + m.columns, x + padded, 0.0f);
  if (linear.active.some()) {
    thread_local std::vector<float> scratch;
    keep_active(linear.active, x, m.columns, scratch);
  }
  if (many && takes_half(m)) {
    for (int i = 0; i < padded; i += kLanes) store(v.half + row * v.stride + i, load(x + i));
  } else if (!many && m.by_columns()) {
    make_list(m, v, row);
  } else if (!many && kIntegers != Integers::kNone && m.integers()) {
    make_integers(v, row, padded, m.zeros);
  }
}

}  // namespace
}  // namespace sparseworks
