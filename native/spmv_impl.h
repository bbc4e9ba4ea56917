// The batch-1 products, compiled once per instruction set under the name SPMV_NAME.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "pool.h"
#include "spmv.h"

namespace sparseworks {
namespace {

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Calls work(row) for all rows on several threads, in pieces of about equal cost.
template <typename Cost, typename Work>
void for_rows(int rows, int threads, const Cost& cost, const Work& work) {
  const int pieces = std::max(1, std::min(rows, threads * 4));
  const auto cut = [&](int p) {
    const int64_t goal = cost(rows) * p / pieces;
    int low = 0, high = rows;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (cost(middle) < goal) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  parallel_for(pieces, threads, [&](int p) {
    const int end = p + 1 == pieces ? rows : cut(p + 1);
    for (int r = cut(p); r < end; ++r) work(r);
  });
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

// x as the sum of two bf16 numbers, 16 bits of mantissa together: the product then needs no
// conversion of the weights.
struct Vector {
  std::vector<uint16_t> high, low;
  Vector(const float* x, int columns, int words) : high(words * 32), low(words * 32) {
    for (int c = 0; c < columns; ++c) {
      uint32_t bits;
      std::memcpy(&bits, x + c, sizeof bits);
      high[c] = static_cast<uint16_t>(bits >> 16);  // cut off, so that the rest is exact
      const float rest = x[c] - from_bf16(high[c]);
      std::memcpy(&bits, &rest, sizeof bits);
      low[c] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
};

inline void step(uint32_t mask, const uint16_t* value, const Vector& x, int word, __m512& a,
                 __m512& b) {
  const auto w =
      reinterpret_cast<__m512bh>(_mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(value)));
  a = _mm512_dpbf16_ps(
      a, w, reinterpret_cast<__m512bh>(_mm512_loadu_si512(x.high.data() + word * 32)));
  b = _mm512_dpbf16_ps(
      b, w, reinterpret_cast<__m512bh>(_mm512_loadu_si512(x.low.data() + word * 32)));
}

#elif defined(__AVX512VBMI2__)

// x as 16 even columns, then 16 odd ones, per word: a bf16 pair in 32 bits splits into two floats
// by a shift and a mask.
struct Vector {
  std::vector<float> ordered;
  Vector(const float* x, int columns, int words) : ordered(words * 32) {
    for (int c = 0; c < columns; ++c) ordered[c / 32 * 32 + c % 2 * 16 + c % 32 / 2] = x[c];
  }
};

inline void step(uint32_t mask, const uint16_t* value, const Vector& x, int word, __m512& even,
                 __m512& odd) {
  const __m512i pair = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(value));
  const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
  const __m512 high =
      _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  even = _mm512_fmadd_ps(low, _mm512_loadu_ps(x.ordered.data() + word * 32), even);
  odd = _mm512_fmadd_ps(high, _mm512_loadu_ps(x.ordered.data() + word * 32 + 16), odd);
}

#endif

#if defined(__AVX512VBMI2__)

constexpr int kAhead = 2048;  // bytes; a prefetch may point anywhere

float row(const MaskedRows& w, int r, const Vector& x) {
  const uint32_t* mask = w.mask + static_cast<int64_t>(r) * w.words;
  const uint16_t* value = w.value + w.start[r];
  __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
  int i = 0;
  for (; i + 1 < w.words; i += 2) {
    _mm_prefetch(reinterpret_cast<const char*>(value) + kAhead, _MM_HINT_T0);
    step(mask[i], value, x, i, a, b);
    value += __builtin_popcount(mask[i]);
    step(mask[i + 1], value, x, i + 1, c, d);
    value += __builtin_popcount(mask[i + 1]);
  }
  if (i < w.words) step(mask[i], value, x, i, a, b);
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, c), _mm512_add_ps(b, d)));
}

// x in 16-bit integers: |x| up to `unit` times 32767, which keeps 15 bits.
struct Integers {
  std::vector<int16_t> value;
  float unit;
  Integers(const float* x, int columns, int words) : value(words * 64) {
    float top = 0.0f;
    for (int c = 0; c < columns; ++c) top = std::max(top, std::fabs(x[c]));
    unit = top / 32767.0f;
    const float inverse = top > 0.0f ? 32767.0f / top : 0.0f;
    for (int c = 0; c < columns; ++c)
      value[c] = static_cast<int16_t>(std::lrintf(x[c] * inverse));
  }
};

float row(const IntegerRows& w, int r, const Integers& x) {
  const uint64_t* mask = w.mask + static_cast<int64_t>(r) * w.words;
  const int8_t* value = w.value + w.start[r];
  const float* scale = w.scale + static_cast<int64_t>(r) * (w.words / 2);
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < w.words; i += 2) {  // 128 columns share a scale
    _mm_prefetch(reinterpret_cast<const char*>(value) + kAhead, _MM_HINT_T0);
    __m512i part = _mm512_setzero_si512();
    for (int j = i; j < i + 2; ++j) {
      const __m512i bytes = _mm512_maskz_expand_epi8(mask[j], _mm512_loadu_si512(value));
      value += __builtin_popcountll(mask[j]);
      const int16_t* p = x.value.data() + j * 64;
      part = _mm512_dpwssd_epi32(part, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)),
                                 _mm512_loadu_si512(p));
      part = _mm512_dpwssd_epi32(part, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1)),
                                 _mm512_loadu_si512(p + 32));
    }
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), _mm512_set1_ps(scale[i / 2]), sum);
  }
  return _mm512_reduce_add_ps(sum) * x.unit;
}

#else

struct Vector {
  const float* x;
  Vector(const float* x, int, int) : x(x) {}
};

float row(const MaskedRows& w, int r, const Vector& x) {
  const uint32_t* mask = w.mask + static_cast<int64_t>(r) * w.words;
  const uint16_t* value = w.value + w.start[r];
  float sum = 0.0f;
  for (int i = 0; i < w.words; ++i)
    for (uint32_t left = mask[i]; left != 0; left &= left - 1)
      sum += from_bf16(*value++) * x.x[i * 32 + __builtin_ctz(left)];
  return sum;
}

using Integers = Vector;

float row(const IntegerRows& w, int r, const Integers& x) {
  const uint64_t* mask = w.mask + static_cast<int64_t>(r) * w.words;
  const int8_t* value = w.value + w.start[r];
  const float* scale = w.scale + static_cast<int64_t>(r) * (w.words / 2);
  float sum = 0.0f;
  for (int i = 0; i < w.words; ++i) {
    float part = 0.0f;
    for (uint64_t left = mask[i]; left != 0; left &= left - 1)
      part += static_cast<float>(*value++) * x.x[i * 64 + __builtin_ctzll(left)];
    sum += part * scale[i / 2];
  }
  return sum;
}

#endif

float row(const IndexedRows& w, int r, const float* x) {
  int64_t i = w.start[r];
  const int64_t end = w.start[r + 1];
#if defined(__AVX512F__)
  const auto step = [&](int64_t at, __m512 sum) {
    const auto half = [](const uint16_t* p) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(half(w.value + at), 16));
    return _mm512_fmadd_ps(value, _mm512_i32gather_ps(half(w.column + at), x, 4), sum);
  };
  __m512 a = _mm512_setzero_ps(), b = a;
  for (; i + 16 < end; i += 32) {
    a = step(i, a);
    b = step(i + 16, b);
  }
  if (i < end) a = step(i, a);
  return _mm512_reduce_add_ps(_mm512_add_ps(a, b));
#else
  float sum[4] = {};
  for (; i < end; i += 4)
    for (int k = 0; k < 4; ++k) sum[k] += from_bf16(w.value[i + k]) * x[w.column[i + k]];
  return sum[0] + sum[1] + (sum[2] + sum[3]);
#endif
}

void masked(const MaskedRows& w, const float* x, const float* bias, float* y, int threads) {
  const Vector ready(x, w.columns, w.words);
  for_rows(
      w.rows, threads,
      [&](int r) { return w.start[r] + static_cast<int64_t>(r) * (w.words + 1); },
      [&](int r) { y[r] = row(w, r, ready) + (bias ? bias[r] : 0.0f); });
}

void indexed(const IndexedRows& w, const float* x, const float* bias, float* y, int threads) {
  for_rows(
      w.rows, threads, [&](int r) { return w.start[r] + r; },
      [&](int r) { y[r] = row(w, r, x) + (bias ? bias[r] : 0.0f); });
}

void integer(const IntegerRows& w, const float* x, const float* bias, float* y, int threads) {
  const Integers ready(x, w.columns, w.words);
  for_rows(
      w.rows, threads,
      [&](int r) { return w.start[r] + static_cast<int64_t>(r) * (w.words + 1); },
      [&](int r) { y[r] = row(w, r, ready) + (bias ? bias[r] : 0.0f); });
}

}  // namespace

const Spmv SPMV_NAME{masked, indexed, integer};

}  // namespace sparseworks
