// The batch-1 product, compiled once per instruction set under the name SPMV_NAME.
#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__AVX512VBMI2__)
#include <immintrin.h>
#endif

#include "pool.h"
#include "spmv.h"

namespace sparseworks {
namespace {

#if defined(__AVX512VBMI2__)

// x comes as 16 even columns, then 16 odd ones, per word: a bf16 pair in 32 bits splits into two
// floats by a shift and a mask.
inline void step(uint32_t mask, const uint16_t* value, const float* x, __m512& even, __m512& odd) {
  const __m512i pair = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(value));
  const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
  const __m512 high =
      _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  even = _mm512_fmadd_ps(low, _mm512_loadu_ps(x), even);
  odd = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + 16), odd);
}

float row(const MaskedRows& w, int r, const float* x) {
  const uint32_t* mask = w.mask + static_cast<int64_t>(r) * w.words;
  const uint16_t* value = w.value + w.start[r];
  __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
  int i = 0;
  for (; i + 1 < w.words; i += 2) {
    step(mask[i], value, x + i * 32, a, b);
    value += __builtin_popcount(mask[i]);
    step(mask[i + 1], value, x + i * 32 + 32, c, d);
    value += __builtin_popcount(mask[i + 1]);
  }
  if (i < w.words) step(mask[i], value, x + i * 32, a, b);
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, c), _mm512_add_ps(b, d)));
}

int place(int c) { return c / 32 * 32 + c % 2 * 16 + c % 32 / 2; }

#else

float row(const MaskedRows& w, int r, const float* x) {
  const uint32_t* mask = w.mask + static_cast<int64_t>(r) * w.words;
  const uint16_t* value = w.value + w.start[r];
  float sum = 0.0f;
  for (int i = 0; i < w.words; ++i)
    for (uint32_t left = mask[i]; left != 0; left &= left - 1) {
      const uint32_t bits = static_cast<uint32_t>(*value++) << 16;
      float v;
      std::memcpy(&v, &bits, sizeof v);
      sum += v * x[i * 32 + __builtin_ctz(left)];
    }
  return sum;
}

int place(int c) { return c; }

#endif

}  // namespace

void SPMV_NAME(const MaskedRows& w, const float* x, const float* bias, float* y, int threads) {
  std::vector<float> ordered(static_cast<size_t>(w.words) * 32, 0.0f);
  for (int c = 0; c < w.columns; ++c) ordered[place(c)] = x[c];
  // pieces of about equal cost, counted in kept values and mask words
  const int pieces = std::max(1, std::min(w.rows, threads * 4));
  const auto cost = [&](int r) { return w.start[r] + static_cast<int64_t>(r) * (w.words + 1); };
  const auto cut = [&](int p) {
    const int64_t goal = cost(w.rows) * p / pieces;
    int low = 0, high = w.rows;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (cost(middle) < goal) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  parallel_for(pieces, threads, [&](int p) {
    const int end = cut(p + 1);
    for (int r = cut(p); r < end; ++r) y[r] = row(w, r, ordered.data()) + (bias ? bias[r] : 0.0f);
  });
}

}  // namespace sparseworks
