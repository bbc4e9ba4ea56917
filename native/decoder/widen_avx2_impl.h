// What AVX2 reads of a panel, and groups of its columns as floats where the format is dense.
#pragma once

#include "widen_impl.h"

namespace sparseworks {
namespace {

#if defined(__AVX2__) && !defined(__AVX512VBMI2__)

// 16 rows: the first eight and the others.
struct EightAndEight {
  __m256i first, rest;
};
struct Floats {
  __m256 first, rest;
};

inline __m256i bytes_at(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline EightAndEight rows_at(const uint8_t* p) { return {bytes_at(p), bytes_at(p + 32)}; }
inline __m256 eight_halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats scales_at(const uint8_t* p) { return {eight_halves(p), eight_halves(p + 16)}; }

// Pairs of bf16 as floats.
inline __m256 evens_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odds_of(__m256i pairs) {
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, top));
}

// Writes one group as [group][16] floats and moves on.
inline void widen_floats(const Matrix& m, Stream& from, float* out) {
  const uint8_t*& at = from.at;
  const bool four = m.format == Format::kInt4;
  const auto put = [&](int column, __m256 first, __m256 rest) {
    _mm256_storeu_ps(out + column * kPanel, first);
    _mm256_storeu_ps(out + column * kPanel + 8, rest);
  };
  if (m.format == Format::kHalf) {
    for (int c = 0; c < m.group; c += 2, at += 64) {
      const EightAndEight pairs = rows_at(at);
      put(c, evens_of(pairs.first), evens_of(pairs.rest));
      put(c + 1, odds_of(pairs.first), odds_of(pairs.rest));
    }
    return;
  }
  if (m.format != Format::kInt8 && !four) return widen_plainly(m, from, out);
  const Floats scale = scales_at(at);
  at += 32;
  // column k of four codes of 8 bits, or k and k + 4 of eight of 4 bits, ends at bit `end`
  const int step = four ? 8 : 4;
  const __m128i bits = _mm_cvtsi32_si128(four ? 28 : 24);
  for (int c = 0; c < m.group; c += step, at += 64) {
    const EightAndEight v = rows_at(at);
    for (int k = 0; k < step; ++k) {
      const int end = four ? 8 * (k % 4) + (k < 4 ? 4 : 8) : 8 * k + 8;
      const auto number = [&](__m256i rows, __m256 scale) {
        const __m256i top = _mm256_sll_epi32(rows, _mm_cvtsi32_si128(32 - end));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sra_epi32(top, bits)), scale);
      };
      put(c + k, number(v.first, scale.first), number(v.rest, scale.rest));
    }
  }
}

#else

inline void widen_floats(const Matrix& m, Stream& from, float* out) { widen_plainly(m, from, out); }

#endif

}  // namespace
}  // namespace sparseworks
