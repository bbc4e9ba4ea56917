// The block-sparse product, compiled once per instruction set under the name BLOCK_NAME.
//
// X is packed in tiles of a few tokens, [pair of columns][token]. Output rows lie in the lanes: a
// vector of weight pairs meets one broadcast pair of activations, and the sums of a strip's rows and
// a tile's tokens stay in registers over all kept blocks. A group of tiles that fits into the second
// cache meets each strip before the next strip is read, which is fetched meanwhile.
#include <algorithm>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "block.h"
#include "finish.h"
#include "pool.h"
#include "scratch.h"

namespace sparseworks {
namespace {

constexpr int kPairs = kUnit / 2;
constexpr int64_t kGroupBytes = 512 << 10;  // of packed X, beside a strip of W
constexpr int64_t kGroupTokens = 96;        // enough to pay for reading W once more

#if defined(__AVX512BF16__)
constexpr int kSums = 24;  // vectors of sums
constexpr int kWords = 1;  // a pair of activations is one word, as the instruction takes it
#elif defined(__AVX512F__)
constexpr int kSums = 20, kWords = 2;  // ... or two floats
#else
constexpr int kSums = 4, kWords = 2;
#endif
constexpr int kWidest = kSums < 16 ? kSums : 24;

// The tokens of a tile for `left` tokens, with strips of `height` rows.
inline int tile_size(int64_t left, int height) {
  const int most = std::min(kWidest, kSums * kLanes / height);
  int best = 1;
  for (int size : {1, 2, 4, 6, 8, 10, 12, 16, 20, 24}) {
    if (size > most) break;
    best = size;
    if (size >= left) break;
  }
  return best;
}

// 32 columns of one token as 16 pairs; missing ones are zero.
inline void pairs(const uint16_t* x, int64_t columns, uint32_t* out) {
  if (columns < 32) std::memset(out, 0, 64);
  std::memcpy(out, x, std::min<int64_t>(columns, 32) * sizeof *x);
}

inline void pairs(const float* x, int64_t columns, uint32_t* out) {
  alignas(64) float all[32] = {};
  if (columns < 32) {
    std::memcpy(all, x, columns * sizeof *x);
    x = all;
  }
  auto* halves = reinterpret_cast<uint16_t*>(out);
  store(halves, load(x));
  store(halves + 16, load(x + 16));
}

// packed[pair][token] for the Size tokens of a tile, of which `count` are there, and up to `readable`
// may be read; units * 8 pairs.
template <int Size, typename T>
void pack(const T* x, int64_t columns, int64_t readable, int count, float* packed) {
  const int64_t all = (columns + kUnit - 1) / kUnit * kPairs;
  alignas(64) float in[16 * 16] = {}, out[16 * 16];
  for (int t0 = 0; t0 < Size; t0 += 16) {
    constexpr int kFull = Size < 16 ? Size : 16;
    const bool whole = sizeof(T) == 2 && columns % 2 == 0 && t0 + 16 <= readable;
    for (int64_t p = 0; p < all; p += 16) {
      const int64_t left = columns - 2 * p;
      if (whole && left >= 32) {
        transpose16(reinterpret_cast<const float*>(x + t0 * columns + 2 * p), columns / 2, out, 16);
      } else {
        for (int t = t0; t < std::min(t0 + 16, count); ++t)
          pairs(x + t * columns + 2 * p, left, reinterpret_cast<uint32_t*>(in + (t - t0) * 16));
        transpose16(in, 16, out, 16);
      }
      const int rows = static_cast<int>(std::min<int64_t>(16, all - p));
      float* to = packed + p * Size * kWords + t0;
      const auto copy = [&](auto tokens) {
        for (int i = 0; i < rows; ++i, to += Size * kWords)
          if constexpr (kWords == 1) {
            std::memcpy(to, out + i * 16, tokens * sizeof *to);
          } else {
            const Bits bits = *reinterpret_cast<const Bits*>(out + i * 16);
            const Bits low = bits << 16, high = bits & 0xffff0000u;
            std::memcpy(to, &low, tokens * sizeof *to);
            std::memcpy(to + Size, &high, tokens * sizeof *to);
          }
      };
      if (t0 + 16 <= Size) copy(std::integral_constant<int, kFull>{});
      else copy(std::integral_constant<int, Size % 16>{});
    }
    std::memset(in, 0, sizeof in);
  }
}

// out[token][row] for R vectors of rows and T tokens: the sum over the blocks of one strip.
template <int R, int T>
void multiply(const uint16_t* column, int64_t blocks, const uint16_t* value, const float* packed,
              Ahead ahead, float* out) {
#if defined(__AVX512BF16__)
  // Few sums would wait for each other, so they are split by pairs.
  constexpr int C = R * T <= 2 ? 4 : R * T <= 4 ? 2 : 1;
  __m512 sum[C][T][R];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 24
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[c][t][r] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    const float* x = packed + static_cast<int64_t>(column[b]) * kPairs * T;
    ahead.fetch();
    for (int p = 0; p < kPairs; p += C)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c, value += R * 32, x += T) {
        __m512bh w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          w[r] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(value + r * 32));
#pragma GCC unroll 24
        for (int t = 0; t < T; ++t) {
          const auto pair = reinterpret_cast<__m512bh>(_mm512_castps_si512(_mm512_set1_ps(x[t])));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[c][t][r] = _mm512_dpbf16_ps(sum[c][t][r], w[r], pair);
        }
      }
  }
#pragma GCC unroll 24
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512 s = sum[0][t][r];
#pragma GCC unroll 4
      for (int c = 1; c < C; ++c) s = _mm512_add_ps(s, sum[c][t][r]);
      _mm512_storeu_ps(out + (t * R + r) * kLanes, s);
    }
#else
  Vec sum[T][R] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const float* x = packed + static_cast<int64_t>(column[b]) * kPairs * T * 2;
    ahead.fetch();
    for (int p = 0; p < kPairs; ++p, value += R * 32, x += 2 * T) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Bits w = loaded<Bits>(value + r * 32);
        const Vec low = as<Vec>(w << 16);
        const Vec high = as<Vec>(w & 0xffff0000u);
#pragma GCC unroll 24
        for (int t = 0; t < T; ++t) {
          sum[t][r] += low * x[t];
          sum[t][r] += high * x[T + t];
        }
      }
    }
  }
#pragma GCC unroll 24
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(out + (t * R + r) * kLanes, sum[t][r]);
#endif
}

using Multiply = void (*)(const uint16_t*, int64_t, const uint16_t*, const float*, Ahead, float*);

// Calls f with the size of a tile as a compile-time constant; tile_size gives no other.
template <int R, typename F>
auto with_size(int size, F&& f) {
#define SIZE(T) \
  if constexpr (R * T <= kSums) \
    if (size == T) return f(std::integral_constant<int, T>{})
  SIZE(24); SIZE(20); SIZE(16); SIZE(12); SIZE(10); SIZE(8); SIZE(6); SIZE(4); SIZE(2);
#undef SIZE
  return f(std::integral_constant<int, 1>{});
}

template <int R>
Multiply multiply_for(int size) {
  return with_size<R>(size, [](auto t) -> Multiply { return multiply<R, decltype(t)::value>; });
}

// The tile of `size` tokens from `t` of which `here` are there.
template <typename T>
void pack_tile(const T* x, int64_t columns, int64_t t, int64_t tokens, int here, int size,
               float* to) {
  with_size<1>(size, [&](auto s) {
    pack<decltype(s)::value>(x + t * columns, columns, tokens - t, here, to);
  });
}

// Strips [begin, end) on the tokens [token, last), packed tile by tile.
template <Activation A, typename T>
void strips_on_tiles(const BlockRows& w, const Batch& call, int begin, int end, int64_t token,
                     int64_t last, const float* packed) {
  const int vectors = w.height / kLanes;
  const int64_t token_floats = static_cast<int64_t>(w.columns + kUnit - 1) / kUnit * kPairs * kWords;
  const T* residual = static_cast<const T*>(call.residual);
  T* y = static_cast<T*>(call.y);
  alignas(64) float sums[kSums * kLanes];
  for (int s = begin; s < end; ++s) {
    const int64_t from = w.start[s], blocks = w.start[s + 1] - from;
    const float* tile = packed;
    // each tile fetches its share of the next strip
    const int64_t tiles = std::max<int64_t>(1, (last - token) / tile_size(kWidest, w.height));
    const int64_t bytes = blocks * kUnit * w.height * sizeof *w.value;
    const int lines = static_cast<int>((kUnit * w.height * 2 / 64 + tiles - 1) / tiles);
    const char* next = reinterpret_cast<const char*>(w.value + from * kUnit * w.height) + bytes;
    for (int64_t t0 = token; t0 < last;) {
      const int size = tile_size(last - t0, w.height);
      const int count = static_cast<int>(std::min<int64_t>(size, last - t0));
      (vectors == 1 ? multiply_for<1>(size) : multiply_for<2>(size))(
          w.column + from, blocks, w.value + from * kUnit * w.height, tile, {next, lines},
          sums);
      next += lines * blocks * 64;
      for (int t = 0; t < count; ++t)
        for (int v = 0; v < vectors; ++v) {
          const int r0 = s * w.height + v * kLanes;
          const int64_t at = (t0 + t) * w.rows + r0;
          if (r0 < w.rows)
            finish<A>(sums + (t * vectors + v) * kLanes, call.bias ? call.bias + r0 : nullptr,
                      residual ? residual + at : nullptr, y + at, std::min(kLanes, w.rows - r0));
        }
      t0 += count;
      tile += size * token_floats;
    }
  }
}

// The first strip of piece `piece` of `pieces`, so that all have about equal numbers of blocks.
int cut(const BlockRows& w, int strips, int piece, int pieces) {
  const auto cost = [&](int s) { return w.start[s] + s; };
  const int64_t goal = cost(strips) * piece / pieces;
  int low = 0, high = strips;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (cost(middle) < goal) low = middle + 1;
    else high = middle;
  }
  return piece == pieces ? strips : low;
}

}  // namespace

void BLOCK_NAME(const BlockRows& w, const Batch& call, int threads) {
  if (call.tokens == 0 || w.rows == 0) return;
  const int strips = (w.rows + w.height - 1) / w.height;
  const int64_t widest = tile_size(kWidest, w.height);
  const int64_t token_floats = static_cast<int64_t>(w.columns + kUnit - 1) / kUnit * kPairs * kWords;
  const int64_t tiles = (call.tokens + widest - 1) / widest;
  const auto scratch = [&](int64_t count) {
    thread_local Scratch memory;
    return memory.aligned(static_cast<size_t>(count * widest * token_floats));
  };
  const auto pack = [&](int64_t tile, float* to) {
    const int64_t t = tile * widest;
    const int size = tile_size(call.tokens - t, w.height);
    const int here = static_cast<int>(std::min<int64_t>(size, call.tokens - t));
    if (call.half_in)
      pack_tile(static_cast<const uint16_t*>(call.x), w.columns, t, call.tokens, here, size, to);
    else
      pack_tile(static_cast<const float*>(call.x), w.columns, t, call.tokens, here, size, to);
  };
  const auto multiply_group = [&](int64_t first, int64_t last, int piece, int pieces,
                                  const float* packed) {
    with_activation(call.activation, [&](auto a) {
      constexpr Activation A = decltype(a)::value;
      const auto run = call.half_out ? strips_on_tiles<A, uint16_t> : strips_on_tiles<A, float>;
      run(w, call, cut(w, strips, piece, pieces), cut(w, strips, piece + 1, pieces),
          first * widest, std::min(call.tokens, last * widest), packed);
    });
  };
  const int64_t tile_bytes = std::max<int64_t>(1, widest * token_floats * sizeof(float));
  const int64_t most = std::max<int64_t>(1, kGroupBytes / tile_bytes);
  int64_t groups = std::max((tiles + most - 1) / most,
                            std::min<int64_t>(4 * threads, call.tokens / kGroupTokens));
  if (groups < threads) {  // few tokens: the threads pack them together, then share the strips
    float* packed = scratch(tiles);
    parallel_for(static_cast<int>(tiles), threads, [&](int tile) {
      pack(tile, packed + tile * widest * token_floats);
    });
    const int pieces = std::min(strips, 4 * threads);
    parallel_for(pieces, threads, [&](int p) { multiply_group(0, tiles, p, pieces, packed); });
    return;
  }
  groups = std::min(tiles, (groups + threads - 1) / threads * threads);
  parallel_for(static_cast<int>(groups), threads, [&](int group) {
    const int64_t first = tiles * group / groups, last = tiles * (group + 1) / groups;
    float* packed = scratch(last - first);
    for (int64_t tile = first; tile < last; ++tile)
      pack(tile, packed + (tile - first) * widest * token_floats);
    multiply_group(first, last, 0, 1, packed);
  });
}

}  // namespace sparseworks
