// 16 rows at a time: what an instruction set offers to pick, for each row, one of the few columns
// of a group. Local to the including file.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bf16.h"

namespace sparseworks {
namespace {

// Whether the positions of fp32 values with groups of `Width` take one word a slot, or two.
template <int Width>
constexpr int kPositionWords = Width == 4 ? 1 : 2;

#if defined(__AVX512F__)

using Sum = __m512;
using Index = __m512i;
constexpr int kSums = 24;

inline void clear(Sum& s) { s = _mm512_setzero_ps(); }
inline void put(float* p, Sum s) { _mm512_storeu_ps(p, s); }
inline Sum numbers(const float* p) { return _mm512_loadu_ps(p); }
inline void add(Sum& s, Sum w, Sum x) { s = _mm512_fmadd_ps(w, x, s); }

template <int Width>
inline Index positions(const uint32_t* q) {
  if constexpr (Width == 4)
    return _mm512_srlv_epi32(
        _mm512_set1_epi32(static_cast<int>(*q)),
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0));
  return _mm512_srlv_epi32(
      _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))),
      _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0));
}

// Of the first or second of each pair.
inline Index pair_positions(const uint32_t* q, int second) {
  const __m512i shift = _mm512_set_epi32(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0);
  return _mm512_srlv_epi32(
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))),
      _mm512_add_epi32(shift, _mm512_set1_epi32(16 * second)));
}

inline Sum pair_numbers(const uint16_t* p, int second) {
  const __m512i both = _mm512_loadu_si512(p);
  return _mm512_castsi512_ps(
      second ? _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
             : _mm512_slli_epi32(both, 16));
}

template <int Width>
inline Sum group(const float* x) {
  if constexpr (Width == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(x));
  if constexpr (Width == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
  return _mm512_loadu_ps(x);
}

// Only the low bits of an index count, so that those of the rows above need no clearing.
template <int Width>
inline Sum pick(Sum x, Index i) {
  if constexpr (Width == 4) return _mm512_permutevar_ps(x, i);
  return _mm512_permutexvar_ps(i, x);
}

#elif defined(__AVX2__)

struct Sum {
  __m256 a, b;
};
struct Index {
  __m256i a, b;
};
constexpr int kSums = 4;

inline void clear(Sum& s) { s.a = s.b = _mm256_setzero_ps(); }
inline void put(float* p, Sum s) {
  _mm256_storeu_ps(p, s.a);
  _mm256_storeu_ps(p + 8, s.b);
}
inline Sum numbers(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void add(Sum& s, Sum w, Sum x) {
  s.a = _mm256_fmadd_ps(w.a, x.a, s.a);
  s.b = _mm256_fmadd_ps(w.b, x.b, s.b);
}

template <int Width>
inline Index positions(const uint32_t* q) {
  if constexpr (Width == 4) {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(*q));
    return {_mm256_srlv_epi32(word, _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0)),
            _mm256_srlv_epi32(word, _mm256_set_epi32(30, 28, 26, 24, 22, 20, 18, 16))};
  } else {
    const __m256i words =
        _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
    return {_mm256_srlv_epi32(words, _mm256_set_epi32(12, 12, 8, 8, 4, 4, 0, 0)),
            _mm256_srlv_epi32(words, _mm256_set_epi32(28, 28, 24, 24, 20, 20, 16, 16))};
  }
}

inline Index pair_positions(const uint32_t* q, int second) {
  const __m256i words =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
  const __m256i shift = _mm256_add_epi32(_mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0),
                                         _mm256_set1_epi32(16 * second));
  return {_mm256_srlv_epi32(words, shift),
          _mm256_srlv_epi32(words, _mm256_add_epi32(shift, _mm256_set1_epi32(8)))};
}

inline Sum pair_numbers(const uint16_t* p, int second) {
  const auto half = [&](const uint16_t* from) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_castsi256_ps(
        second ? _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))
               : _mm256_slli_epi32(both, 16));
  };
  return {half(p), half(p + 16)};
}

template <int Width>
inline Sum group(const float* x) {
  if constexpr (Width == 4) {
    const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
    return {four, four};
  } else {
    return {_mm256_loadu_ps(x), Width == 8 ? _mm256_setzero_ps() : _mm256_loadu_ps(x + 8)};
  }
}

template <int Width>
inline Sum pick(Sum x, Index i) {
  if constexpr (Width == 4) {
    return {_mm256_permutevar_ps(x.a, i.a), _mm256_permutevar_ps(x.b, i.b)};
  } else {
    const auto eight = [&](__m256i at) {
      const __m256 low = _mm256_permutevar8x32_ps(x.a, at);
      if constexpr (Width == 8) return low;
      return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(x.b, at),
                              _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));  // bit 3
    };
    return {eight(i.a), eight(i.b)};
  }
}

#else

using Sum = Vec;
struct Index {
  uint8_t at[kLanes];
};
constexpr int kSums = 4;

inline void clear(Sum& s) { s = Vec{}; }
inline void put(float* p, Sum s) { store(p, s); }
inline Sum numbers(const float* p) { return load(p); }
inline void add(Sum& s, Sum w, Sum x) { s += w * x; }

template <int Width>
inline Index positions(const uint32_t* q) {
  Index out;
  for (int r = 0; r < kLanes; ++r)
    out.at[r] = Width == 4 ? *q >> (2 * r) & 3 : q[r % 2] >> (4 * (r / 2)) & 15;
  return out;
}

inline Index pair_positions(const uint32_t* q, int second) {
  Index out;
  for (int r = 0; r < kLanes; ++r) out.at[r] = q[r % 4] >> (4 * (r / 4) + 16 * second) & 15;
  return out;
}

inline Sum pair_numbers(const uint16_t* p, int second) {
  const Bits both = loaded<Bits>(p);
  return as<Vec>(second ? Bits(both & 0xffff0000u) : Bits(both << 16));
}

template <int Width>
inline const float* group(const float* x) {
  return x;
}

template <int Width>
inline Sum pick(const float* x, Index i) {
  float out[kLanes];
  for (int r = 0; r < kLanes; ++r) out[r] = x[i.at[r] & (Width - 1)];
  return load(out);
}

#endif

}  // namespace
}  // namespace sparseworks
