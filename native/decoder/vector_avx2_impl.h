// A panel of a matrix times one vector, with AVX2: formats without bit masks. Inputs are integers of
// 16 bits, so that products of bytes, two by two, are exact. Part of vector_impl.h.
#pragma once

#include <array>

#include "widen_avx2_impl.h"

namespace sparseworks {
namespace {

constexpr int kAhead = 4096;  // bytes; a prefetch may point anywhere
inline EightAndEight rows_ahead(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
  return rows_at(p);
}

// Four codes in each 32-bit lane: every second one, widened to 16 bits.
struct Codes {
  __m256i even, odd;
};
template <int Left, int LeftOfOdd, int Right>
SPARSEWORKS_INLINE Codes codes(__m256i v) {
  const auto shifted = [](__m256i x, int left) {
    return left == 0 ? x : _mm256_slli_epi16(x, left);
  };
  return {_mm256_srai_epi16(shifted(v, Left), Right), _mm256_srai_epi16(shifted(v, LeftOfOdd), Right)};
}
SPARSEWORKS_INLINE Codes whole_codes(__m256i v) { return codes<8, 0, 8>(v); }
SPARSEWORKS_INLINE Codes low_codes(__m256i v) { return codes<12, 4, 12>(v); }
SPARSEWORKS_INLINE Codes high_codes(__m256i v) { return codes<8, 0, 12>(v); }

// Sums of codes times inputs, over a group.
template <int T>
struct Sums {
  EightAndEight part[T] = {};

  SPARSEWORKS_INLINE void add(const Codes& first, const Codes& rest, const Input* x, int column) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256i even = _mm256_set1_epi32(static_cast<int>(word32(x[t].high + column)));
      const __m256i odd = _mm256_set1_epi32(static_cast<int>(word32(x[t].low + column)));
      const auto sum = [&](const Codes& c) {
        return _mm256_add_epi32(_mm256_madd_epi16(c.even, even), _mm256_madd_epi16(c.odd, odd));
      };
      part[t].first = _mm256_add_epi32(part[t].first, sum(first));
      part[t].rest = _mm256_add_epi32(part[t].rest, sum(rest));
    }
  }
  SPARSEWORKS_INLINE void scaled(const Floats& scale, Floats* sum) const {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      sum[t].first = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[t].first), scale.first, sum[t].first);
      sum[t].rest = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[t].rest), scale.rest, sum[t].rest);
    }
  }
};

template <int T, bool Four>
inline void integer_panel(const Matrix& m, const uint8_t* at, const Input* x, Floats* sum) {
  for (int c = 0; c < m.padded(); c += m.group) {
    const Floats scale = scales_at(at);
    at += 32;
    Sums<T> part;
    for (int i = 0; i < m.group; i += Four ? 8 : 4, at += 64) {
      const EightAndEight v = rows_ahead(at);
      if constexpr (Four) {
        part.add(low_codes(v.first), low_codes(v.rest), x, c + i);
        part.add(high_codes(v.first), high_codes(v.rest), x, c + i + 4);
      } else {
        part.add(whole_codes(v.first), whole_codes(v.rest), x, c + i);
      }
    }
    part.scaled(scale, sum);
  }
}

// For each of eight bits: where in what was packed the lane of a set bit is.
inline __m256i places_of(unsigned bits) {
  static const auto table = [] {
    std::array<std::array<int32_t, 8>, 256> found{};
    for (unsigned b = 0; b < 256; ++b)
      for (int lane = 0, next = 0; lane < 8; ++lane)
        if (b >> lane & 1) found[b][static_cast<size_t>(lane)] = next++;
    return found;
  }();
  return bytes_at(reinterpret_cast<const uint8_t*>(table[bits].data()));
}

// Eight rows of a group of which some are kept; the others have a scale of 0.
struct KeptRows {
  __m256i place, kept;
  int count;
  explicit KeptRows(unsigned bits) : place(places_of(bits)), count(__builtin_popcount(bits)) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  }
  __m256i fours(const uint8_t* p) const { return _mm256_permutevar8x32_epi32(bytes_at(p), place); }
  __m256 numbers(__m256 packed) const {
    return _mm256_and_ps(_mm256_permutevar8x32_ps(packed, place), _mm256_castsi256_ps(kept));
  }
  __m256 scales(const uint8_t* p) const { return numbers(eight_halves(p)); }
  __m256 zeros(const uint8_t* p) const {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return numbers(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)));
  }
};

template <int T>
inline void group_int4_panel(const Matrix& m, Stream from, const Input* x, Floats* sum) {
  const uint8_t* at = from.at;
  for (int c = 0; c < m.padded(); c += m.group, from.rows += 2) {
    const KeptRows a(from.rows[0]), b(from.rows[1]);
    const int count = a.count + b.count;
    const Floats scale{a.scales(at), b.scales(at + 2 * a.count)};
    at += 2 * count;
    Floats less{};
    if (m.zeros) {
      less = {_mm256_mul_ps(a.zeros(at), scale.first), _mm256_mul_ps(b.zeros(at + a.count), scale.rest)};
      at += count;
    }
    Sums<T> part;
    for (int i = 0; i < m.group; i += 8, at += 4 * count) {
      const __m256i v = a.fours(at), w = b.fours(at + 4 * a.count);
      part.add(low_codes(v), low_codes(w), x, c + i);
      part.add(high_codes(v), high_codes(w), x, c + i + 4);
    }
    part.scaled(scale, sum);
    if (!m.zeros) continue;
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < m.group; i += 16) {
        const __m256 total = _mm256_set1_ps(x[t].sums[(c + i) / 16]);
        sum[t].first = _mm256_fnmadd_ps(less.first, total, sum[t].first);
        sum[t].rest = _mm256_fnmadd_ps(less.rest, total, sum[t].rest);
      }
  }
}

// Few vectors sum in several chains, as a product would else wait for the one before.
template <int T>
inline void half_panel(const Matrix& m, const uint8_t* at, const Input* x, Floats* sum) {
  constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;
  Floats part[T][kChains] = {};
  const auto add = [&](int c, int k, const Floats& w) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256 v = _mm256_set1_ps(x[t].value[c + k]);
      Floats& s = part[t][k % kChains];
      s.first = _mm256_fmadd_ps(w.first, v, s.first);
      s.rest = _mm256_fmadd_ps(w.rest, v, s.rest);
    }
  };
  for (int c = 0; c < m.padded(); c += 4, at += 128)
#pragma GCC unroll 2
    for (int k = 0; k < 4; k += 2) {
      const EightAndEight pairs = rows_ahead(at + 32 * k);
      add(c, k, {evens_of(pairs.first), evens_of(pairs.rest)});
      add(c, k + 1, {odds_of(pairs.first), odds_of(pairs.rest)});
    }
  for (int t = 0; t < T; ++t)
    for (const Floats& s : part[t]) {
      sum[t].first = _mm256_add_ps(sum[t].first, s.first);
      sum[t].rest = _mm256_add_ps(sum[t].rest, s.rest);
    }
}

template <int T>
inline void panel_product(const Matrix& m, int panel, const Input* x, Vec* y) {
  if constexpr (T > 4) {
    panel_product<T / 2>(m, panel, x, y);
    panel_product<T / 2>(m, panel, x + T / 2, y + T / 2);
    return;
  } else {
    const Stream from(m, panel);
    Floats sum[T] = {};
    switch (m.format) {
      case Format::kHalf: half_panel<T>(m, from.at, x, sum); break;
      case Format::kInt8: integer_panel<T, false>(m, from.at, x, sum); break;
      case Format::kInt4: integer_panel<T, true>(m, from.at, x, sum); break;
      case Format::kGroupInt4: group_int4_panel<T>(m, from, x, sum); break;
      default:
        for (int t = 0; t < T; ++t) y[t] = panel_plainly(m, panel, x[t]);
        return;
    }
    for (int t = 0; t < T; ++t) {
      const __m256 unit = _mm256_set1_ps(m.integers() ? x[t].unit : 1.0f);
      y[t] = {_mm256_mul_ps(sum[t].first, unit), _mm256_mul_ps(sum[t].rest, unit)};
    }
  }
}

}  // namespace
}  // namespace sparseworks
