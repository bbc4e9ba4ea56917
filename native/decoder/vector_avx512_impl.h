// The same with AVX-512 VBMI2 and VNNI: all formats, inputs as two bytes. Part of vector_impl.h.
#pragma once

#include "widen_avx512_impl.h"

namespace sparseworks {
namespace {

constexpr int kAhead = 4096;  // bytes; a prefetch may point anywhere

inline void fetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead, _MM_HINT_T0);
}

inline __m512i four(const uint8_t* p) { return _mm512_set1_epi32(static_cast<int>(word32(p))); }

// T vectors at once: weights are taken apart once for all of them. One vector alone sums in two
// chains, as its next product would else wait for the last one.
template <int T>
constexpr int kChains = T == 1 ? 2 : 1;

// Sums of codes times both halves of the inputs.
template <int T>
struct Sums {
  __m512i high[T][kChains<T>] = {}, low[T][kChains<T>] = {};

  // Every lane has four columns of its own, counted from `first`.
  void add_listed(int part, __m512i codes, __m512i columns, const Input* x, int first) {
    for (int t = 0; t < T; ++t) {
      __m512i &h = high[t][part % kChains<T>], &l = low[t][part % kChains<T>];
      const auto of = [&](const uint8_t* from) {
        return _mm512_permutexvar_epi8(columns, _mm512_loadu_si512(from + first));
      };
      h = _mm512_dpbusd_epi32(h, of(x[t].high), codes);
      l = _mm512_dpbusd_epi32(l, of(x[t].low), codes);
    }
  }

  void add(int part, __m512i codes, const Input* x, int column) {
    for (int t = 0; t < T; ++t) {
      __m512i &h = high[t][part % kChains<T>], &l = low[t][part % kChains<T>];
      h = _mm512_dpbusd_epi32(h, four(x[t].high + column), codes);
      l = _mm512_dpbusd_epi32(l, four(x[t].low + column), codes);
    }
  }

  __m512 total(int t) const {
    __m512i h = high[t][0], l = low[t][0];
    if (kChains<T> == 2) {
      h = _mm512_add_epi32(h, high[t][kChains<T> - 1]);
      l = _mm512_add_epi32(l, low[t][kChains<T> - 1]);
    }
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 8), l));
  }

  void scaled(__m512 scale, __m512* sum) const {
    for (int t = 0; t < T; ++t) sum[t] = _mm512_fmadd_ps(total(t), scale, sum[t]);
  }
};

template <int T>
inline void int8_panel(const Matrix& m, const uint8_t* at, const Input* x, __m512* sum) {
  for (int c = 0; c < m.padded(); c += m.group) {
    const __m512 scale = scales_at(at);
    at += 32;
    Sums<T> part;
    for (int i = 0; i < m.group; i += 8, at += 128) {
      fetch(at);
      fetch(at + 64);
      part.add(0, _mm512_loadu_si512(at), x, c + i);
      part.add(1, _mm512_loadu_si512(at + 64), x, c + i + 4);
    }
    part.scaled(scale, sum);
  }
}

template <int T>
inline void int4_panel(const Matrix& m, const uint8_t* at, const Input* x, __m512* sum) {
  for (int c = 0; c < m.padded(); c += m.group) {
    const __m512 scale = scales_at(at);
    at += 32;
    Sums<T> part;
    for (int i = 0; i < m.group; i += 8, at += 64) {
      fetch(at);
      const __m512i v = _mm512_loadu_si512(at);
      part.add(0, low_codes(v), x, c + i);
      part.add(1, high_codes(v), x, c + i + 4);
    }
    part.scaled(scale, sum);
  }
}

template <int T>
inline void masked_int8_panel(const Matrix& m, const uint8_t* at, const Input* x, __m512* sum) {
  for (int c = 0; c < m.padded(); c += m.group) {
    const __m512 scale = scales_at(at);
    const uint8_t* mask = at + 32;
    at = mask + 2 * m.group;
    for (int i = 0; i < m.group; i += 32) fetch(mask + 2 * i);
    Sums<T> part;
    for (int i = 0; i < m.group; i += 8) {
      const uint64_t a = word64(mask + 2 * i), b = word64(mask + 2 * i + 8);
      fetch(at);
      part.add(0, _mm512_maskz_expand_epi8(a, _mm512_loadu_si512(at)), x, c + i);
      at += __builtin_popcountll(a);
      part.add(1, _mm512_maskz_expand_epi8(b, _mm512_loadu_si512(at)), x, c + i + 4);
      at += __builtin_popcountll(b);
    }
    part.scaled(scale, sum);
  }
}

template <int T>
inline void masked_int4_panel(const Matrix& m, const uint8_t* at, const Input* x, __m512* sum) {
  for (int c = 0; c < m.padded(); c += m.group) {
    const __m512 scale = scales_at(at);
    const uint8_t* mask = at + 32;
    at = mask + 2 * m.group;
    for (int i = 0; i < m.group; i += 32) fetch(mask + 2 * i);
    Sums<T> part;
    for (int i = 0; i < m.group; i += 8) {
      const uint64_t a = word64(mask + 2 * i), b = word64(mask + 2 * i + 8);
      fetch(at);
      const __m512i v = _mm512_loadu_si512(at);
      part.add(0, _mm512_maskz_expand_epi8(a, low_codes(v)), x, c + i);
      part.add(1, _mm512_maskz_expand_epi8(b, high_codes(v)), x, c + i + 4);
      const int used = __builtin_popcountll(a), other = __builtin_popcountll(b);
      at += used > other ? used : other;
    }
    part.scaled(scale, sum);
  }
}

template <int T>
inline void listed_int8_panel(const Matrix& m, Stream from, const Input* x, __m512* sum) {
  const uint8_t *at = from.at, *rows = from.rows;
  for (int c = 0; c < m.padded(); c += m.group) {
    const __m512 scale = scales_at(at);
    at += 32;
    fetch(rows);
    Sums<T> part;
    for (int i = c; i < c + m.group; i += kListed)
      for (int step = 0; step < from.steps; ++step, rows += 2) {
        const __mmask16 live = word16(rows);
        const int fours = 4 * __builtin_popcount(live);
        fetch(at);
        fetch(at + 64);
        const __m512i columns = _mm512_maskz_expand_epi32(live, _mm512_loadu_si512(at));
        const __m512i codes = _mm512_maskz_expand_epi32(live, _mm512_loadu_si512(at + fours));
        part.add_listed(step, codes, columns, x, i);
        at += 2 * fours;
      }
    part.scaled(scale, sum);
  }
}

// Codes are 16 times what they stand for, as in the other formats of 4 bits.
template <int T, bool Zeros>
inline void group_int4_panel(const Matrix& m, Stream from, const Input* x, __m512* sum) {
  for (int c = 0; c < m.padded(); c += m.group, from.rows += 2) {
    const KeptGroup kept(m, from);
    const uint8_t*& at = from.at;
    fetch(at);
    fetch(at + 64);
    at = kept.codes;
    Sums<T> part;
    for (int i = 0; i < m.group; i += 8, at += 4 * kept.count) {
      const __m512i v = _mm512_maskz_expand_epi32(kept.rows, _mm512_loadu_si512(at));
      part.add(0, low_codes(v), x, c + i);
      part.add(1, high_codes(v), x, c + i + 4);
    }
    part.scaled(kept.scale, sum);
    if (!Zeros) continue;
    const __m512 less = _mm512_mul_ps(kept.zero, kept.scale);
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < m.group; i += 16)
        sum[t] = _mm512_fnmadd_ps(less, _mm512_set1_ps(16.0f * x[t].sums[(c + i) / 16]), sum[t]);
  }
}

// Two columns of 16 rows, in the halves of 32 bits, times two numbers of each vector.
template <int T>
inline void add_pairs(__m512i pairs, const Input* x, int column, __m512 (*sum)[2]) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, top));
  for (int t = 0; t < T; ++t) {
    sum[t][0] = _mm512_fmadd_ps(even, _mm512_set1_ps(x[t].value[column]), sum[t][0]);
    sum[t][1] = _mm512_fmadd_ps(odd, _mm512_set1_ps(x[t].value[column + 1]), sum[t][1]);
  }
}

template <int T>
inline void half_panel(const Matrix& m, const uint8_t* at, const Input* x, __m512* sum) {
  __m512 part[2][T][2] = {};
  for (int c = 0; c < m.padded(); c += 4, at += 128) {
    fetch(at);
    fetch(at + 64);
    add_pairs<T>(_mm512_loadu_si512(at), x, c, part[0]);
    add_pairs<T>(_mm512_loadu_si512(at + 64), x, c + 2, part[T == 1 ? 1 : 0]);
  }
  for (int t = 0; t < T; ++t)
    sum[t] = _mm512_add_ps(_mm512_add_ps(part[0][t][0], part[0][t][1]),
                           _mm512_add_ps(part[1][t][0], part[1][t][1]));
}

template <int T>
inline void masked_half_panel(const Matrix& m, const uint8_t* at, const Input* x, __m512* sum) {
  __m512 part[2][T][2] = {};
  for (int c = 0; c < m.padded(); c += m.group) {
    const uint8_t* mask = at;
    at += 2 * m.group;
    for (int i = 0; i < m.group; i += 32) fetch(mask + 2 * i);
    for (int i = 0; i < m.group; i += 4)
      for (int k = 0; k < 2; ++k) {
        const uint32_t bits = word32(mask + 2 * i + 4 * k);
        fetch(at);
        add_pairs<T>(_mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(at)), x, c + i + 2 * k,
                     part[T == 1 ? k : 0]);
        at += 2 * __builtin_popcount(bits);
      }
  }
  for (int t = 0; t < T; ++t)
    sum[t] = _mm512_add_ps(_mm512_add_ps(part[0][t][0], part[0][t][1]),
                           _mm512_add_ps(part[1][t][0], part[1][t][1]));
}

template <int T>
inline void float_panel(const Matrix& m, const uint8_t* at, const Input* x, __m512* sum) {
  __m512 part[2][T] = {};
  for (int c = 0; c < m.padded(); c += 2, at += 128)
    for (int k = 0; k < 2; ++k) {
      fetch(at + 64 * k);
      const __m512 w = _mm512_loadu_ps(at + 64 * k);
      for (int t = 0; t < T; ++t)
        part[k][t] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[t].value[c + k]), part[k][t]);
    }
  for (int t = 0; t < T; ++t) sum[t] = _mm512_add_ps(part[0][t], part[1][t]);
}

template <int T>
inline void panel_product(const Matrix& m, int panel, const Input* x, Vec* y) {
  const Stream from(m, panel);
  const uint8_t* at = from.at;
  __m512 sum[T] = {};
  switch (m.format) {
    case Format::kFloat: float_panel<T>(m, at, x, sum); break;
    case Format::kHalf: half_panel<T>(m, at, x, sum); break;
    case Format::kMaskedHalf: masked_half_panel<T>(m, at, x, sum); break;
    case Format::kInt8: int8_panel<T>(m, at, x, sum); break;
    case Format::kInt4: int4_panel<T>(m, at, x, sum); break;
    case Format::kMaskedInt8: masked_int8_panel<T>(m, at, x, sum); break;
    case Format::kMaskedInt4: masked_int4_panel<T>(m, at, x, sum); break;
    case Format::kGroupInt4:
      if (m.zeros) group_int4_panel<T, true>(m, from, x, sum);
      else group_int4_panel<T, false>(m, from, x, sum);
      break;
    case Format::kListedInt8: listed_int8_panel<T>(m, from, x, sum); break;
    case Format::kColumnInt8:
    case Format::kColumnInt4: break;  // of tiles
  }
  if (m.integers()) {
    const bool eight = m.format == Format::kInt8 || m.format == Format::kMaskedInt8 ||
                       m.format == Format::kListedInt8;
    const __m512 part = _mm512_set1_ps(eight ? 1.0f : 1.0f / 16);
    const __m512 moved = _mm512_mul_ps(_mm512_loadu_ps(m.data + m.offset[panel]),
                                       _mm512_set1_ps(kMiddle));
    for (int t = 0; t < T; ++t)
      sum[t] = _mm512_mul_ps(_mm512_fmsub_ps(sum[t], part, moved), _mm512_set1_ps(x[t].unit));
  }
  for (int t = 0; t < T; ++t) y[t] = as<Vec>(sum[t]);
}

}  // namespace
}  // namespace sparseworks
