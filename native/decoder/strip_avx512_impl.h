// Sums of the rows that 64 bytes of columns hold, with AVX-512 VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sparseworks {
namespace {

// 64 rows in 8 bits; in 4 bits 64 in the low halves of the bytes, and 64 more. Codes are moved, and
// `less` takes away what that adds to a sum.
template <bool Four>
class Strip {
 public:
  static constexpr int kBytes = 64;

  explicit Strip(int less) {
    for (int k = 0; k < kCount; ++k) {
      high_[k] = _mm512_setzero_si512();
      low_[k] = _mm512_set1_epi32(less);
    }
  }

  // Four columns at p, whose inputs are 256 high + low, a byte each.
  void add(const uint8_t* const* p, int high, int low) {
    const __m512i h = _mm512_set1_epi32(high), l = _mm512_set1_epi32(low);
    const __m512i a = _mm512_loadu_si512(p[0]), b = _mm512_loadu_si512(p[1]);
    const __m512i c = _mm512_loadu_si512(p[2]), d = _mm512_loadu_si512(p[3]);
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    const __m512i ef = _mm512_unpackhi_epi8(a, b), gh = _mm512_unpackhi_epi8(c, d);
    put(0, _mm512_unpacklo_epi16(ab, cd), h, l);
    put(1, _mm512_unpackhi_epi16(ab, cd), h, l);
    put(2, _mm512_unpacklo_epi16(ef, gh), h, l);
    put(3, _mm512_unpackhi_epi16(ef, gh), h, l);
  }

  // out += scale * sum, from the strip's first row on.
  void finish(const uint8_t* scales, float* out) const {
    for (int k = 0; k < kCount; ++k) {
      const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high_[k], 8), low_[k]);
      const __m512 scale = _mm512_cvtph_ps(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 32 * k)));
      _mm512_storeu_ps(out + 16 * k, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale,
                                                     _mm512_loadu_ps(out + 16 * k)));
    }
  }

 private:
  static constexpr int kCount = Four ? 8 : 4;

  void put(int k, __m512i codes, __m512i h, __m512i l) {
    if (!Four) return add_codes(k, codes, h, l);
    const __m512i nibble = _mm512_set1_epi8(15);
    add_codes(k, _mm512_and_si512(codes, nibble), h, l);
    add_codes(k + 4, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble), h, l);
  }
  void add_codes(int k, __m512i codes, __m512i h, __m512i l) {
    high_[k] = _mm512_dpbusd_epi32(high_[k], codes, h);
    low_[k] = _mm512_dpbusd_epi32(low_[k], codes, l);
  }

  __m512i high_[kCount], low_[kCount];
};

}  // namespace
}  // namespace sparseworks
