// Products of int8 weights and inputs. Four inputs are the bytes of a 32-bit word, each moved by 128
// so that it is unsigned; sums are exact in int32.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "bf16.h"

namespace sparseworks {
namespace {

constexpr uint32_t kZeros = 0x80808080u;  // four

// Lanes of nothing but what is not a number compare as more than infinity.
inline IntVec magnitude(Vec v) { return as<IntVec>(v) & 0x7fffffff; }
inline IntVec larger(IntVec a, IntVec b) { return maximum(a, b); }

// What a value of largest magnitude `range` is multiplied with to be in [-127, 127].
inline Vec steps(Vec range) { return select(range > 1e-30f, 127.0f / range, Vec{}); }

// To nearest, ties to even; any vector.
template <typename V>
SPARSEWORKS_INLINE auto whole(V v) {
  if constexpr (sizeof(V) > kRegister) {
    return joined(whole(v.low), whole(v.high));
  } else {
    using Whole = Numbers<uint32_t, Of<V>::count>;
#if defined(__AVX512F__)
    return (Whole)_mm512_cvtps_epi32(v);
#elif defined(__AVX2__)
    return (Whole)_mm256_cvtps_epi32(v);
#elif defined(__SSE2__)
    return (Whole)_mm_cvtps_epi32(v);
#else
    asm("" : "+m"(v));  // a product is rounded before it is added to
    return (Whole)(v + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23: the last bit is 1
#endif
  }
}

#if !defined(__AVX512VNNI__)
using Shorts = Numbers<int16_t, 2 * kLanes>;

// Products of neighbouring shorts, added two by two.
template <typename V>
SPARSEWORKS_INLINE auto multiplied(const V& a, const V& b) {
  if constexpr (sizeof(V) > kRegister) {
    return joined(multiplied(a.low, b.low), multiplied(a.high, b.high));
  } else {
    using Sums = Numbers<int32_t, Of<V>::count / 2>;
#if defined(__AVX512BW__)
    return (Sums)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Sums)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Sums)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const Sums x = (Sums)a, y = (Sums)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
  }
}
#endif

// Four weights, the same in every lane.
struct Four {
#if defined(__AVX512VNNI__)
  IntVec four;
  explicit Four(int bits) : four(all(bits)) {}
#else
  Shorts even, odd;  // widened
  explicit Four(int bits)
      : even(as<Shorts>(all(bits)) << 8 >> 8), odd(as<Shorts>(all(bits)) >> 8) {}
#endif

  IntVec added(IntVec sum, IntVec x) const {
#if defined(__AVX512VNNI__)
    return as<IntVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                        reinterpret_cast<__m512i>(x),
                                                        reinterpret_cast<__m512i>(four)));
#else
    const Bits bytes = as<Bits>(x);
    sum += multiplied(as<Shorts>(bytes & 0x00ff00ff), even);
    return sum + multiplied(as<Shorts>(bytes >> 8 & 0x00ff00ff), odd);
#endif
  }
};

// The largest magnitude of an image from those of its channels: pieces of channels have a slot each.
inline Vec range_of(const float* slots, int count, int lanes) {
  IntVec most{};
  for (int i = 0; i < count; ++i) most = larger(most, magnitude(load(slots + i * kLanes)));
  if (lanes > 1) return as<Vec>(most);
  int32_t at[kLanes];
  stored(at, most);
  return as<Vec>(all(*std::max_element(at, at + kLanes)));
}

}  // namespace
}  // namespace sparseworks
