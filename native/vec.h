// Vectors of 16 floats, whatever the processor's width: the compiler splits them where it must.
// Included once per instruction set, so everything here is local to the including file.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparseworks {
namespace {

constexpr int kLanes = 16;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(64)));
typedef float LooseVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec all(float x) { return x - Vec{}; }  // 0 + x would have to turn -0 into 0

typedef int IntVec __attribute__((vector_size(64), aligned(64)));

// What is not a number comes through as the second one.
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }

// Lanes 0, 2, 4, ... of a, then of b.
inline Vec evens(Vec a, Vec b) {
  typedef int Index __attribute__((vector_size(64)));
  const Index at = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(a, b, at);
}

// out[c][t] = in[t][c] for 16 x 16 floats.
inline void transpose16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  typedef int Index __attribute__((vector_size(64)));
  Vec r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = *reinterpret_cast<const LooseVec*>(in + i * in_stride);
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
    *reinterpret_cast<LooseVec*>(out + (k)*out_stride) = __builtin_shuffle(a, c, low);
    *reinterpret_cast<LooseVec*>(out + (4 + k) * out_stride) = __builtin_shuffle(b, d, low);
    *reinterpret_cast<LooseVec*>(out + (8 + k) * out_stride) = __builtin_shuffle(a, c, high);
    *reinterpret_cast<LooseVec*>(out + (12 + k) * out_stride) = __builtin_shuffle(b, d, high);
  }
#else
  for (int c = 0; c < 16; ++c)
    for (int t = 0; t < 16; ++t) out[c * out_stride + t] = in[t * in_stride + c];
#endif
}

}  // namespace
}  // namespace sparseworks
