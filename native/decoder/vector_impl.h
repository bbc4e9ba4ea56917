// A panel of a matrix times one vector: 16 sums.
#pragma once

#include "widen_impl.h"

namespace sparseworks {
namespace {

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

#if defined(__AVX512VBMI2__)

constexpr int kAhead = 4096;  // bytes; a prefetch may point anywhere

inline void fetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead, _MM_HINT_T0);
}

inline __m512i four(const uint8_t* p) { return _mm512_set1_epi32(static_cast<int>(word32(p))); }

// Sums of codes times both halves of the inputs, in two chains each.
struct Sums {
  __m512i high[2] = {}, low[2] = {};
  void add(int chain, __m512i codes, const Input& x, int column) {
    high[chain] = _mm512_dpbusd_epi32(high[chain], four(x.high + column), codes);
    low[chain] = _mm512_dpbusd_epi32(low[chain], four(x.low + column), codes);
  }
  __m512 total() const {
    const __m512i h = _mm512_slli_epi32(_mm512_add_epi32(high[0], high[1]), 8);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(h, _mm512_add_epi32(low[0], low[1])));
  }
};

inline __m512 int8_panel(const Matrix& m, const uint8_t* at, const Input& x) {
  __m512 sum = _mm512_setzero_ps();
  for (int c = 0; c < m.padded(); c += m.group) {
    const __m512 scale = scales_at(at);
    at += 32;
    Sums part;
    for (int i = 0; i < m.group; i += 8, at += 128) {
      fetch(at);
      fetch(at + 64);
      part.add(0, _mm512_loadu_si512(at), x, c + i);
      part.add(1, _mm512_loadu_si512(at + 64), x, c + i + 4);
    }
    sum = _mm512_fmadd_ps(part.total(), scale, sum);
  }
  return sum;
}

inline __m512 int4_panel(const Matrix& m, const uint8_t* at, const Input& x) {
  __m512 sum = _mm512_setzero_ps();
  for (int c = 0; c < m.padded(); c += m.group) {
    const __m512 scale = scales_at(at);
    at += 32;
    Sums part;
    for (int i = 0; i < m.group; i += 8, at += 64) {
      fetch(at);
      const __m512i v = _mm512_loadu_si512(at);
      part.add(0, low_codes(v), x, c + i);
      part.add(1, high_codes(v), x, c + i + 4);
    }
    sum = _mm512_fmadd_ps(part.total(), scale, sum);
  }
  return sum;
}

inline __m512 masked_int8_panel(const Matrix& m, const uint8_t* at, const Input& x) {
  __m512 sum = _mm512_setzero_ps();
  for (int c = 0; c < m.padded(); c += m.group) {
    const __m512 scale = scales_at(at);
    const uint8_t* mask = at + 32;
    at = mask + 2 * m.group;
    for (int i = 0; i < m.group; i += 32) fetch(mask + 2 * i);
    Sums part;
    for (int i = 0; i < m.group; i += 8) {
      const uint64_t a = word64(mask + 2 * i), b = word64(mask + 2 * i + 8);
      fetch(at);
      part.add(0, _mm512_maskz_expand_epi8(a, _mm512_loadu_si512(at)), x, c + i);
      at += __builtin_popcountll(a);
      part.add(1, _mm512_maskz_expand_epi8(b, _mm512_loadu_si512(at)), x, c + i + 4);
      at += __builtin_popcountll(b);
    }
    sum = _mm512_fmadd_ps(part.total(), scale, sum);
  }
  return sum;
}

inline __m512 masked_int4_panel(const Matrix& m, const uint8_t* at, const Input& x) {
  __m512 sum = _mm512_setzero_ps();
  for (int c = 0; c < m.padded(); c += m.group) {
    const __m512 scale = scales_at(at);
    const uint8_t* mask = at + 32;
    at = mask + 2 * m.group;
    for (int i = 0; i < m.group; i += 32) fetch(mask + 2 * i);
    Sums part;
    for (int i = 0; i < m.group; i += 8) {
      const uint64_t a = word64(mask + 2 * i), b = word64(mask + 2 * i + 8);
      fetch(at);
      const __m512i v = _mm512_loadu_si512(at);
      part.add(0, _mm512_maskz_expand_epi8(a, low_codes(v)), x, c + i);
      part.add(1, _mm512_maskz_expand_epi8(b, high_codes(v)), x, c + i + 4);
      const int used = __builtin_popcountll(a), other = __builtin_popcountll(b);
      at += used > other ? used : other;
    }
    sum = _mm512_fmadd_ps(part.total(), scale, sum);
  }
  return sum;
}

// Codes are 16 times what they stand for, as in the other layouts of 4 bits.
template <bool Zeros>
inline __m512 group_int4_panel(const Matrix& m, Stream from, const Input& x) {
  __m512 sum = _mm512_setzero_ps();
  for (int c = 0; c < m.padded(); c += m.group, from.rows += 2) {
    const KeptGroup kept(m, from);
    const uint8_t*& at = from.at;
    fetch(at);
    fetch(at + 64);
    at = kept.codes;
    Sums part;
    for (int i = 0; i < m.group; i += 8, at += 4 * kept.count) {
      const __m512i v = _mm512_maskz_expand_epi32(kept.rows, _mm512_loadu_si512(at));
      part.add(0, low_codes(v), x, c + i);
      part.add(1, high_codes(v), x, c + i + 4);
    }
    __m512 total = part.total();
    if (Zeros)
      for (int i = 0; i < m.group; i += 16)
        total = _mm512_fnmadd_ps(kept.zero, _mm512_set1_ps(16.0f * x.sums[(c + i) / 16]), total);
    sum = _mm512_fmadd_ps(total, kept.scale, sum);
  }
  return sum;
}

inline __m512 half_panel(const Matrix& m, const uint8_t* at, const Input& x) {
  __m512 sum[4] = {};
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int c = 0; c < m.padded(); c += 4, at += 128) {
    fetch(at);
    fetch(at + 64);
    for (int k = 0; k < 2; ++k) {
      const __m512i v = _mm512_loadu_si512(at + 64 * k);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(v, top));
      sum[2 * k] = _mm512_fmadd_ps(even, _mm512_set1_ps(x.value[c + 2 * k]), sum[2 * k]);
      sum[2 * k + 1] = _mm512_fmadd_ps(odd, _mm512_set1_ps(x.value[c + 2 * k + 1]), sum[2 * k + 1]);
    }
  }
  return _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
}

inline __m512 masked_half_panel(const Matrix& m, const uint8_t* at, const Input& x) {
  __m512 sum[4] = {};
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int c = 0; c < m.padded(); c += m.group) {
    const uint8_t* mask = at;
    at += 2 * m.group;
    for (int i = 0; i < m.group; i += 32) fetch(mask + 2 * i);
    for (int i = 0; i < m.group; i += 4)
      for (int k = 0; k < 2; ++k) {
        const uint32_t bits = word32(mask + 2 * i + 4 * k);
        fetch(at);
        const __m512i v = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(at));
        at += 2 * __builtin_popcount(bits);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(v, top));
        const float* value = x.value + c + i + 2 * k;
        sum[2 * k] = _mm512_fmadd_ps(even, _mm512_set1_ps(value[0]), sum[2 * k]);
        sum[2 * k + 1] = _mm512_fmadd_ps(odd, _mm512_set1_ps(value[1]), sum[2 * k + 1]);
      }
  }
  return _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
}

inline __m512 float_panel(const Matrix& m, const uint8_t* at, const Input& x) {
  __m512 sum[4] = {};
  for (int c = 0; c < m.padded(); c += 4, at += 256)
    for (int k = 0; k < 4; ++k) {
      fetch(at + 64 * k);
      sum[k] = _mm512_fmadd_ps(_mm512_loadu_ps(at + 64 * k), _mm512_set1_ps(x.value[c + k]), sum[k]);
    }
  return _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
}

inline __m512 integer_panel(const Matrix& m, const Stream& from, const Input& x) {
  const uint8_t* at = from.at;
  switch (m.format) {
    case Format::kInt8: return int8_panel(m, at, x);
    case Format::kInt4: return int4_panel(m, at, x);
    case Format::kMaskedInt8: return masked_int8_panel(m, at, x);
    case Format::kMaskedInt4: return masked_int4_panel(m, at, x);
    default: return m.zeros ? group_int4_panel<true>(m, from, x)
                              : group_int4_panel<false>(m, from, x);
  }
}

// Whether integers of the inputs are used (else `value`).
constexpr bool kIntegers = true;

inline Vec panel_product(const Matrix& m, int panel, const Input& x) {
  const Stream from(m, panel);
  const uint8_t* at = from.at;
  if (m.format == Format::kFloat) return reinterpret_cast<Vec>(float_panel(m, at, x));
  if (m.format == Format::kHalf) return reinterpret_cast<Vec>(half_panel(m, at, x));
  if (m.format == Format::kMaskedHalf) return reinterpret_cast<Vec>(masked_half_panel(m, at, x));
  const bool eight = m.format == Format::kInt8 || m.format == Format::kMaskedInt8;
  const __m512 sum = integer_panel(m, from, x);
  const __m512 moved = _mm512_mul_ps(_mm512_loadu_ps(m.data + m.offset[panel]),
                                     _mm512_set1_ps(kMiddle));
  const __m512 found = eight ? _mm512_sub_ps(sum, moved)
                             : _mm512_fmsub_ps(sum, _mm512_set1_ps(1.0f / 16), moved);
  return reinterpret_cast<Vec>(_mm512_mul_ps(found, _mm512_set1_ps(x.unit)));
}

#else

constexpr bool kIntegers = false;

inline Vec panel_product(const Matrix& m, int panel, const Input& x) {
  return panel_plainly(m, panel, x);
}

#endif

}  // namespace
}  // namespace sparseworks
