// Products of int8 weights and inputs. Four inputs are the bytes of a 32-bit word, each moved by 128
// so that it is unsigned; sums are exact in int32.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "bf16.h"

namespace sparseworks {
namespace {

constexpr uint32_t kZeros = 0x80808080u;  // four

// Lanes of nothing but what is not a number compare as more than infinity.
inline IntVec magnitude(Vec v) { return reinterpret_cast<IntVec>(v) & 0x7fffffff; }
inline IntVec larger(IntVec a, IntVec b) { return a > b ? a : b; }

// What a value of largest magnitude `range` is multiplied with to be in [-127, 127].
inline Vec steps(Vec range) { return range > 1e-30f ? 127.0f / range : Vec{}; }

// To nearest, ties to even.
inline Bits whole(Vec v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(v)));
#else
  asm("" : "+m"(v));  // a product is rounded before it is added to
  return reinterpret_cast<Bits>(v + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23: the last bit is 1
#endif
}

#if !defined(__AVX512VNNI__)
typedef short Shorts __attribute__((vector_size(64), aligned(64), may_alias));

// Products of neighbouring shorts, added two by two.
inline IntVec multiplied(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<IntVec>(
      _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  struct Parts { __m256i part[2]; } x, y;
  std::memcpy(&x, &a, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  for (int i = 0; i < 2; ++i) x.part[i] = _mm256_madd_epi16(x.part[i], y.part[i]);
  IntVec sum;
  std::memcpy(&sum, &x, sizeof sum);
  return sum;
#elif defined(__SSE2__)
  struct Parts { __m128i part[4]; } x, y;
  std::memcpy(&x, &a, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  for (int i = 0; i < 4; ++i) x.part[i] = _mm_madd_epi16(x.part[i], y.part[i]);
  IntVec sum;
  std::memcpy(&sum, &x, sizeof sum);
  return sum;
#else
  const IntVec x = reinterpret_cast<IntVec>(a), y = reinterpret_cast<IntVec>(b);
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}
#endif

// Four weights, the same in every lane.
struct Four {
#if defined(__AVX512VNNI__)
  IntVec all;
  explicit Four(int bits) : all(bits - IntVec{}) {}
#else
  Shorts even, odd;  // widened
  explicit Four(int bits)
      : even(reinterpret_cast<Shorts>(bits - IntVec{}) << 8 >> 8),
        odd(reinterpret_cast<Shorts>(bits - IntVec{}) >> 8) {}
#endif

  IntVec added(IntVec sum, IntVec x) const {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                        reinterpret_cast<__m512i>(x),
                                                        reinterpret_cast<__m512i>(all)));
#else
    const Bits bytes = reinterpret_cast<Bits>(x);
    sum += multiplied(reinterpret_cast<Shorts>(bytes & 0x00ff00ff), even);
    return sum + multiplied(reinterpret_cast<Shorts>(bytes >> 8 & 0x00ff00ff), odd);
#endif
  }
};

// The largest magnitude of an image from those of its channels: pieces of channels have a slot each.
inline Vec range_of(const float* slots, int count, int lanes) {
  IntVec most{};
  for (int i = 0; i < count; ++i) most = larger(most, magnitude(load(slots + i * kLanes)));
  if (lanes > 1) return reinterpret_cast<Vec>(most);
  int one = 0;
  for (int i = 0; i < kLanes; ++i) one = most[i] > one ? most[i] : one;
  return reinterpret_cast<Vec>(one - IntVec{});
}

}  // namespace
}  // namespace sparseworks
