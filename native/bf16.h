// bf16 in and out of vectors of floats. Rounds to nearest, ties to even; NaN stays NaN.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace sparseworks {
namespace {

// These may look at memory of any type.
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(64), may_alias));
typedef uint32_t LooseBits __attribute__((vector_size(64), aligned(4), may_alias));

inline Vec load(const uint16_t* p) {
  const Bits wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits);
  return reinterpret_cast<Vec>(wide << 16);
}

// In the low 16 bits of each lane.
inline Bits rounded(Vec v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits nan = bits >> 16 | 0x40;
  return (bits & 0x7fffffff) > 0x7f800000 ? nan : even;
}

// Lanes (a, b) as pairs of bf16, a in the low half.
inline Vec paired(Vec a, Vec b) {
#if defined(__AVX512BF16__)
  const Bits low = __builtin_convertvector(reinterpret_cast<Halves>(_mm512_cvtneps_pbh(a)), Bits);
  const Bits high = __builtin_convertvector(reinterpret_cast<Halves>(_mm512_cvtneps_pbh(b)), Bits);
#else
  const Bits low = rounded(a), high = rounded(b);
#endif
  return reinterpret_cast<Vec>(low | high << 16);
}

inline void store(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
  // takes subnormal numbers as zero
  *reinterpret_cast<Halves*>(p) = reinterpret_cast<Halves>(_mm512_cvtneps_pbh(v));
  return;
#endif
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(rounded(v), Halves);
}

}  // namespace
}  // namespace sparseworks
