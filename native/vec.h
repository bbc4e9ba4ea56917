// Vectors of 16 floats, whatever the processor's width: the compiler splits them where it must.
// Included once per instruction set, so everything here is local to the including file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace sparseworks {
namespace {

constexpr int kLanes = 16;

using Vec = Numbers<float, kLanes>;
using IntVec = Numbers<int32_t, kLanes>;

SPARSEWORKS_INLINE Vec load(const float* p) { return loaded<Vec>(p); }
SPARSEWORKS_INLINE void store(float* p, const Vec& v) { stored(p, v); }
SPARSEWORKS_INLINE Vec all(float x) { return x - Vec{}; }  // 0 + x would have to turn -0 into 0
SPARSEWORKS_INLINE IntVec all(int x) { return x - IntVec{}; }

// 0, 1, 2, ...
SPARSEWORKS_INLINE IntVec lanes() {
  alignas(64) static constexpr int32_t kAt[] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                8, 9, 10, 11, 12, 13, 14, 15};
  return loaded<IntVec>(kAt);
}

inline float first(const Vec& v) {
  float at[kLanes];
  store(at, v);
  return at[0];
}

// From the first lane to the last one.
inline float sum_of(const Vec& v) {
  float at[kLanes], sum = 0;
  store(at, v);
  for (const float x : at) sum += x;
  return sum;
}

inline float largest_of(const Vec& v) {
  float at[kLanes];
  store(at, v);
  float most = at[0];
  for (const float x : at) most = x > most ? x : most;
  return most;
}

inline Vec inverse_root(const Vec& v) {
  float at[kLanes];
  store(at, v);
  for (float& x : at) x = 1.0f / std::sqrt(x);
  return load(at);
}

// out[c][t] = in[t][c] for 16 x 16 floats.
inline void transpose16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  typedef int Index __attribute__((vector_size(64)));
  Vec r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = load(in + i * in_stride);
  const Index lo = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  const Index hi = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shuffle(r[i], r[i + 1], lo);
    t[i + 1] = __builtin_shuffle(r[i], r[i + 1], hi);
  }
  const Index lo2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const Index hi2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  for (int i = 0; i < 16; i += 4) {
    r[i] = __builtin_shuffle(t[i], t[i + 2], lo2);
    r[i + 1] = __builtin_shuffle(t[i], t[i + 2], hi2);
    r[i + 2] = __builtin_shuffle(t[i + 1], t[i + 3], lo2);
    r[i + 3] = __builtin_shuffle(t[i + 1], t[i + 3], hi2);
  }
  // r[4 g + k] holds, in 128-bit lane l, column 4 l + k of rows 4 g .. 4 g + 3
  const Index even = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  const Index odd = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
  const Index low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const Index high = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
  for (int k = 0; k < 4; ++k) {
    const Vec a = __builtin_shuffle(r[k], r[4 + k], even);
    const Vec b = __builtin_shuffle(r[k], r[4 + k], odd);
    const Vec c = __builtin_shuffle(r[8 + k], r[12 + k], even);
    const Vec d = __builtin_shuffle(r[8 + k], r[12 + k], odd);
    store(out + (k)*out_stride, __builtin_shuffle(a, c, low));
    store(out + (4 + k) * out_stride, __builtin_shuffle(b, d, low));
    store(out + (8 + k) * out_stride, __builtin_shuffle(a, c, high));
    store(out + (12 + k) * out_stride, __builtin_shuffle(b, d, high));
  }
#elif defined(__AVX2__)
  for (int part = 0; part < 4; ++part) {
    const float* from = in + part / 2 * 8 * in_stride + part % 2 * 8;
    float* to = out + part % 2 * 8 * out_stride + part / 2 * 8;
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * in_stride);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)  // r[i + k] holds, in 128-bit lane l, column 4 l + k of 4 rows
      for (int k = 0; k < 2; ++k) {
        r[i + 2 * k] = _mm256_shuffle_ps(t[i + k], t[i + k + 2], 0x44);
        r[i + 2 * k + 1] = _mm256_shuffle_ps(t[i + k], t[i + k + 2], 0xee);
      }
    for (int k = 0; k < 4; ++k) {
      _mm256_storeu_ps(to + k * out_stride, _mm256_permute2f128_ps(r[k], r[4 + k], 0x20));
      _mm256_storeu_ps(to + (4 + k) * out_stride, _mm256_permute2f128_ps(r[k], r[4 + k], 0x31));
    }
  }
#else
  for (int c = 0; c < 16; ++c)
    for (int t = 0; t < 16; ++t) out[c * out_stride + t] = in[t * in_stride + c];
#endif
}

}  // namespace
}  // namespace sparseworks
