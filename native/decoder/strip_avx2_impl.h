// Sums of the rows that 32 bytes of columns hold, with AVX2: half of those of 64 bytes, 8 of each 16.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sparseworks {
namespace {

// Codes are moved, and `less` takes away what that adds to a sum. Products of bytes are added in
// pairs of 16 bits, which hold codes of 4 bits: those of 8 bits are taken in halves.
template <bool Four>
class Strip {
 public:
  static constexpr int kBytes = 32;

  explicit Strip(int less) {
    for (__m256i& sum : sum_) sum = _mm256_set1_epi32(less);
  }

  // Four columns at p, whose inputs are 256 high + low, a byte each.
  void add(const uint8_t* const* p, int high, int low) {
    const __m256i h = _mm256_set1_epi32(high), l = _mm256_set1_epi32(low);
    const __m256i a = at(p[0]), b = at(p[1]), c = at(p[2]), d = at(p[3]);
    const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
    const __m256i ef = _mm256_unpackhi_epi8(a, b), gh = _mm256_unpackhi_epi8(c, d);
    put(0, _mm256_unpacklo_epi16(ab, cd), h, l);
    put(1, _mm256_unpackhi_epi16(ab, cd), h, l);
    put(2, _mm256_unpacklo_epi16(ef, gh), h, l);
    put(3, _mm256_unpackhi_epi16(ef, gh), h, l);
  }

  // out += scale * sum, for 8 rows of each 16 from the strip's first row on.
  void finish(const uint8_t* scales, float* out) const {
    for (int k = 0; k < kCount; ++k) {
      const __m256 scale =
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 32 * k)));
      _mm256_storeu_ps(out + 16 * k, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum_[k]), scale,
                                                     _mm256_loadu_ps(out + 16 * k)));
    }
  }

 private:
  static constexpr int kCount = Four ? 8 : 4;

  static __m256i at(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  void put(int k, __m256i codes, __m256i h, __m256i l) {
    const __m256i nibble = _mm256_set1_epi8(15);
    add_codes<1>(k, _mm256_and_si256(codes, nibble), h, l);
    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
    if (Four) add_codes<1>(k + 4, upper, h, l);
    else add_codes<16>(k, upper, h, l);
  }
  template <int Unit>
  void add_codes(int k, __m256i codes, __m256i h, __m256i l) {
    const __m256i upper = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, h), _mm256_set1_epi16(256 * Unit));
    const __m256i lower = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, l), _mm256_set1_epi16(Unit));
    sum_[k] = _mm256_add_epi32(sum_[k], _mm256_add_epi32(upper, lower));
  }

  __m256i sum_[kCount];
};

}  // namespace
}  // namespace sparseworks
