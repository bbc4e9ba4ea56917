// fp16 in and out of vectors of floats.
#pragma once

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "../vec.h"

namespace sparseworks {
namespace {

inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  float v;
  if (rest >= 0x7c00) {  // infinity or not a number
    const uint32_t bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  if (rest < 0x400) {
    v = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -v : v;
  }
  const uint32_t bits = sign | ((rest << 13) + (112u << 23));
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// To nearest, ties to even; beyond the range the largest finite number.
inline uint16_t to_half(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7bff);
  if (bits < 0x38800000) {  // subnormal: the sum has its last bit at 2^-24
    float small;
    std::memcpy(&small, &bits, sizeof small);
    small += 0.5f;
    std::memcpy(&bits, &small, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  const uint32_t odd = bits >> 13 & 1;
  return static_cast<uint16_t>(sign | ((bits + 0xfff + odd - (112u << 23)) >> 13));
}

inline Vec load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return as<Vec>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  const auto* eight = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(eight)), _mm256_cvtph_ps(_mm_loadu_si128(eight + 1))};
#else
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = from_half(p[i]);
  return load(v);
#endif
}

inline void store_half(uint16_t* p, Vec v) {
  v = minimum(all(65504.0f), maximum(all(-65504.0f), v));
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__F16C__)
  auto* eight = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(eight, _mm256_cvtps_ph(v.low, 0));
  _mm_storeu_si128(eight + 1, _mm256_cvtps_ph(v.high, 0));
#else
  float at[kLanes];
  store(at, v);
  for (int i = 0; i < kLanes; ++i) p[i] = to_half(at[i]);
#endif
}

}  // namespace
}  // namespace sparseworks
