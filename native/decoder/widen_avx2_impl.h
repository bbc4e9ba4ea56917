// Groups of columns of a panel as floats, with AVX2 where the format is dense.
#pragma once

#include "widen_impl.h"

namespace sparseworks {
namespace {

#if defined(__AVX2__) && !defined(__AVX512VBMI2__)

// Writes one group as [group][16] floats and moves on.
inline void widen_floats(const Matrix& m, Stream& from, float* out) {
  const uint8_t*& at = from.at;
  const bool four = m.format == Format::kInt4;
  if (m.format == Format::kHalf) {
    for (int c = 0; c < m.group; c += 2, at += 64)
      for (int half = 0; half < 2; ++half) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * half));
        const __m256i odd = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
        float* to = out + c * kPanel + 8 * half;
        _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
        _mm256_storeu_ps(to + kPanel, _mm256_castsi256_ps(odd));
      }
    return;
  }
  if (m.format != Format::kInt8 && !four) return widen_plainly(m, from, out);
  __m256 scale[2];
  for (int half = 0; half < 2; ++half)
    scale[half] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + half));
  at += 32;
  // column k of four codes of 8 bits, or k and k + 4 of eight of 4 bits, ends at bit `end`
  const int step = four ? 8 : 4, bits = four ? 28 : 24;
  for (int c = 0; c < m.group; c += step, at += 64)
    for (int half = 0; half < 2; ++half) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * half));
      for (int k = 0; k < step; ++k) {
        const int end = four ? 8 * (k % 4) + (k < 4 ? 4 : 8) : 8 * k + 8;
        const __m256i top = _mm256_sll_epi32(v, _mm_cvtsi32_si128(32 - end));
        const __m256 code = _mm256_cvtepi32_ps(_mm256_sra_epi32(top, _mm_cvtsi32_si128(bits)));
        _mm256_storeu_ps(out + (c + k) * kPanel + 8 * half, _mm256_mul_ps(code, scale[half]));
      }
    }
}

#else

inline void widen_floats(const Matrix& m, Stream& from, float* out) { widen_plainly(m, from, out); }

#endif

}  // namespace
}  // namespace sparseworks
