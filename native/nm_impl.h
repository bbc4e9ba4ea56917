// The N:M product, compiled once per instruction set under the name NM_NAME.
//
// 16 output rows lie in the lanes. A group's few activations are broadcast, every row picks its own
// by a permutation, and the sums of some strips and tokens stay in registers over all groups. X is
// read where it lies; only where its dtype or width does not fit is it copied.
#include <algorithm>
#include <cstring>

#include "finish.h"
#include "nm.h"
#include "nm_lanes.h"
#include "pool.h"
#include "scratch.h"

namespace sparseworks {
namespace {

constexpr int kTile = 12;                   // tokens of the largest tile
constexpr int64_t kGroupBytes = 384 << 10;  // of X, beside the strips of W in the second cache

// fp32 values.
template <int W>
struct Single {
  static constexpr int kWidth = W, kWords = kPositionWords<W>, kValueWords = 16;
  using X = float;
  struct Weight {
    Sum value;
    Index index;
  };
  static Weight weight(const uint32_t* value, const uint32_t* position) {
    return {numbers(reinterpret_cast<const float*>(value)), positions<W>(position)};
  }
  static auto table(const X* x) { return group<W>(x); }
  template <typename Table>
  static void multiply(Sum& sum, const Weight& w, const Table& x) {
    add(sum, w.value, pick<W>(x, w.index));
  }
};

#if defined(__AVX512BF16__)

// Pairs of bf16 values.
template <int W>
struct Half {
  static constexpr int kWidth = W, kWords = 4, kValueWords = 16;
  using X = uint16_t;
  struct Weight {
    __m512bh value;
    __m512i index;
  };
  static Weight weight(const uint32_t* value, const uint32_t* position) {
    const __m512i fields =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(position)));
    const __m512i shift = _mm512_set_epi32(0xc000c, 0xc000c, 0xc000c, 0xc000c, 0x80008, 0x80008,
                                           0x80008, 0x80008, 0x40004, 0x40004, 0x40004, 0x40004,
                                           0, 0, 0, 0);
    return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(value)),
            _mm512_srlv_epi16(fields, shift)};
  }
  static __m512i table(const X* x) {
    if constexpr (W == 8)
      return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static void multiply(Sum& sum, const Weight& w, __m512i x) {
    sum = _mm512_dpbf16_ps(sum, w.value,
                           reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(w.index, x)));
  }
};

#else

// Pairs of bf16 values, multiplied in fp32 with an x that was rounded to bf16.
template <int W>
struct Half {
  static constexpr int kWidth = W, kWords = 4, kValueWords = 16;
  using X = float;
  struct Weight {
    Sum first, second;
    Index at_first, at_second;
  };
  static Weight weight(const uint32_t* value, const uint32_t* position) {
    const auto* halves = reinterpret_cast<const uint16_t*>(value);
    return {pair_numbers(halves, 0), pair_numbers(halves, 1), pair_positions(position, 0),
            pair_positions(position, 1)};
  }
  static auto table(const X* x) { return group<W>(x); }
  template <typename Table>
  static void multiply(Sum& sum, const Weight& w, const Table& x) {
    add(sum, w.first, pick<W>(x, w.at_first));
    add(sum, w.second, pick<W>(x, w.at_second));
  }
};

#endif

// Some strips: `value` and `position` of the first one, and how far the next one is (in words).
struct Strips {
  const uint32_t* value;
  const uint32_t* position;
  int64_t values, positions;
  int groups, slots;
};

// out[token][strip][row] for R strips and N tokens, which lie `pitch` numbers apart.
template <typename K, int R, int N>
void multiply(const Strips& w, const void* tokens, int64_t pitch, Ahead ahead, float* out) {
  Sum sum[N][R];
#pragma GCC unroll 12
  for (int t = 0; t < N; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) clear(sum[t][r]);
  const uint32_t *value = w.value, *position = w.position;
  const auto* x = static_cast<const typename K::X*>(tokens);
  for (int g = 0; g < w.groups; ++g, x += K::kWidth) {
    ahead.fetch();
    for (int s = 0; s < w.slots; ++s, value += K::kValueWords, position += K::kWords) {
      typename K::Weight weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        weight[r] = K::weight(value + r * w.values, position + r * w.positions);
#pragma GCC unroll 12
      for (int t = 0; t < N; ++t) {
        const auto table = K::table(x + t * pitch);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) K::multiply(sum[t][r], weight[r], table);
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < N; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) put(out + (t * R + r) * kLanes, sum[t][r]);
}

using Multiply = void (*)(const Strips&, const void*, int64_t, Ahead, float*);

// The most tokens of a tile with R strips that are not more than `left`.
inline int tile_size(int64_t left, int strips) {
  for (int size : {12, 8, 6, 4, 2})
    if (size <= left && size * strips <= kSums) return size;
  return 1;
}

template <typename K, int R>
Multiply multiply_for(int size) {
#define SIZE(N) \
  if constexpr (R * N <= kSums) \
    if (size == N) return multiply<K, R, N>
  SIZE(12); SIZE(8); SIZE(6); SIZE(4); SIZE(2);
#undef SIZE
  return multiply<K, R, 1>;  // tile_size gives no other
}

template <typename K>
Multiply multiply_for(int strips, int size) {
  return strips == 4   ? multiply_for<K, 4>(size)
         : strips == 2 ? multiply_for<K, 2>(size)
                       : multiply_for<K, 1>(size);
}

// X as the kernel reads it: a token every `pitch` numbers of `bytes` bytes.
struct Tokens {
  const char* x;
  int64_t pitch;
  int bytes;
};

// `count` strips from `strip` on the tokens [token, last).
template <Activation A, typename T>
void strips_on_tokens(const GroupedRows& g, const Strips& w, const Batch& batch, int strip,
                      int count, const Tokens& tokens, int64_t token, int64_t last,
                      Multiply (*choose)(int, int)) {
  const T* residual = static_cast<const T*>(batch.residual);
  T* y = static_cast<T*>(batch.y);
  // each tile fetches its share of the strips that come next
  const int64_t tiles = std::max<int64_t>(1, (last - token) / tile_size(last - token, count));
  const int lines = static_cast<int>((w.slots * count + tiles - 1) / tiles);
  Ahead ahead{reinterpret_cast<const char*>(w.value + count * w.values), lines};
  alignas(64) float sums[std::max(kSums, 4) * kLanes];
  while (token < last) {
    const int size = tile_size(last - token, count);
    choose(count, size)(w, tokens.x + token * tokens.pitch * tokens.bytes, tokens.pitch, ahead,
                        sums);
    for (int t = 0; t < size; ++t)
      for (int r = 0; r < count; ++r) {
        const int r0 = (strip + r) * kLanes;
        const int64_t at = (token + t) * g.rows + r0;
        finish<A>(sums + (t * count + r) * kLanes, batch.bias ? batch.bias + r0 : nullptr,
                  residual ? residual + at : nullptr, y + at, std::min(kLanes, g.rows - r0));
      }
    token += size;
    ahead.at += static_cast<int64_t>(lines) * w.groups * 64;
  }
}

// The tokens as the kernel reads them: rounded to bf16 if `rounding`, `pitch` numbers each.
template <typename X, typename T>
void convert(const T* x, int64_t columns, int64_t pitch, bool rounding, X* to) {
  for (int64_t c = 0; c < pitch; c += kLanes) {
    const int64_t left = std::min<int64_t>(kLanes, columns - c);
    alignas(64) T part[kLanes] = {};
    if (left > 0) std::memcpy(part, x + c, left * sizeof *x);
    Vec v = load(part);
    if (rounding) v = as<Vec>(rounded(v) << 16);
    alignas(64) X out[kLanes];
    store(out, v);
    std::memcpy(to + c, out, std::min<int64_t>(kLanes, pitch - c) * sizeof *to);
  }
}

// X where it lies, or a copy in `scratch` where its dtype or width does not fit.
template <typename K>
Tokens readable(const GroupedRows& g, const Batch& batch, int threads, Scratch& scratch) {
  using X = typename K::X;
  const int64_t pitch = static_cast<int64_t>(g.columns + g.width - 1) / g.width * g.width;
  const bool rounding = g.half && sizeof(X) == 4;
  if (batch.half_in == (sizeof(X) == 2) && !rounding && pitch == g.columns)
    return {static_cast<const char*>(batch.x), pitch, sizeof(X)};
  X* copy = reinterpret_cast<X*>(scratch.aligned(batch.tokens * pitch));
  constexpr int64_t kShare = 16;  // tokens
  parallel_for(static_cast<int>((batch.tokens + kShare - 1) / kShare), threads, [&](int p) {
    for (int64_t t = p * kShare; t < std::min(batch.tokens, (p + 1) * kShare); ++t) {
      const int64_t at = t * g.columns;
      if (batch.half_in)
        convert(static_cast<const uint16_t*>(batch.x) + at, g.columns, pitch, rounding,
                copy + t * pitch);
      else
        convert(static_cast<const float*>(batch.x) + at, g.columns, pitch, rounding,
                copy + t * pitch);
    }
  });
  return {reinterpret_cast<const char*>(copy), pitch, sizeof(X)};
}

template <typename K>
void run(const GroupedRows& g, const Batch& batch, int threads) {
  thread_local Scratch scratch;
  const Tokens tokens = readable<K>(g, batch, threads, scratch);
  const int groups = static_cast<int>(tokens.pitch / K::kWidth);
  const int strips = (g.rows + kLanes - 1) / kLanes;
  const int64_t values = static_cast<int64_t>(groups) * g.slots * K::kValueWords;
  const int64_t words = static_cast<int64_t>(groups) * g.slots * K::kWords;
  const int64_t token_bytes = std::max<int64_t>(1, tokens.pitch * tokens.bytes);
  const int64_t share = std::max<int64_t>(1, kGroupBytes / token_bytes / kTile) * kTile;
  const int shares = static_cast<int>((batch.tokens + share - 1) / share);
  const int several = batch.tokens < 8 ? 4 : 2;  // strips that are taken together
  const int units = (strips + several - 1) / several;
  const int pieces = std::max(1, std::min(units, (8 * threads + shares - 1) / shares));
  const auto cut = [&](int64_t p) {
    return std::min(strips, static_cast<int>(units * p / pieces) * several);
  };
  // Pieces that run at the same time share their weights.
  parallel_for(shares * pieces, threads, [&](int item) {
    const int piece = item / shares, end = cut(piece + 1);
    const int64_t first = item % shares * share, last = std::min(batch.tokens, first + share);
    with_activation(batch.activation, [&](auto a) {
      constexpr Activation A = decltype(a)::value;
      const auto take = batch.half_out ? strips_on_tokens<A, uint16_t> : strips_on_tokens<A, float>;
      for (int s = cut(piece); s < end;) {
        const int count = std::min(several, end - s) == 3 ? 2 : std::min(several, end - s);
        const Strips w{static_cast<const uint32_t*>(g.value) + s * values,
                       g.position + s * words, values, words, groups, g.slots};
        take(g, w, batch, s, count, tokens, first, last, multiply_for<K>);
        s += count;
      }
    });
  });
}

}  // namespace

void NM_NAME(const GroupedRows& w, const Batch& batch, int threads) {
  if (batch.tokens == 0 || w.rows == 0) return;
  if (w.half)
    (w.width == 8 ? run<Half<8>> : run<Half<16>>)(w, batch, threads);
  else
    (w.width == 4 ? run<Single<4>> : w.width == 8 ? run<Single<8>> : run<Single<16>>)(w, batch,
                                                                                       threads);
}

}  // namespace sparseworks
