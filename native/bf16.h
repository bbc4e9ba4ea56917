// bf16 in and out of vectors of floats. Rounds to nearest, ties to even; NaN stays NaN.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace sparseworks {
namespace {

using Halves = Numbers<uint16_t, kLanes>;
using Bits = Numbers<uint32_t, kLanes>;

SPARSEWORKS_INLINE Vec load(const uint16_t* p) {
  return as<Vec>(converted<Bits>(loaded<Halves>(p)) << 16);
}

// In the low 16 bits of each lane.
inline Bits rounded(Vec v) {
  const Bits bits = as<Bits>(v);
  const Bits even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits nan = bits >> 16 | 0x40;
  return select((bits & 0x7fffffff) > 0x7f800000, nan, even);
}

// Lanes (a, b) as pairs of bf16, a in the low half.
inline Vec paired(Vec a, Vec b) {
#if defined(__AVX512BF16__)
  const Bits low = converted<Bits>(as<Halves>(_mm512_cvtneps_pbh(a)));
  const Bits high = converted<Bits>(as<Halves>(_mm512_cvtneps_pbh(b)));
#else
  const Bits low = rounded(a), high = rounded(b);
#endif
  return as<Vec>(low | high << 16);
}

inline void store(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
  // takes subnormal numbers as zero
  stored(p, as<Halves>(_mm512_cvtneps_pbh(v)));
#else
  stored(p, converted<Halves>(rounded(v)));
#endif
}

}  // namespace
}  // namespace sparseworks
