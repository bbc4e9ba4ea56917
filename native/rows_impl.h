// The sparse product: out[row][p] = activation(sum over taps value * in[p + offset] + bias[row] +
// residual[row][p]). A kept weight is one broadcast times a run of positions; the accumulators of a
// block of rows and positions stay in registers.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "bf16.h"
#include "int8.h"
#include "math.h"

namespace sparseworks {
namespace {

#if defined(__AVX512F__)
constexpr int kRun = 16, kPair = 8, kQuad = 6;  // vectors a block, by rows a block
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRun = 6, kPair = 3, kQuad = 1;
#else
constexpr int kRun = 2, kPair = 1, kQuad = 1;
#endif

constexpr int kWorth = 8;  // vectors a piece, below which reading a tap costs more than its products

// What piece `part` of `parts` has of `count` things: [first, last).
inline std::pair<int, int> share(int count, int part, int parts) {
  return {static_cast<int>(static_cast<int64_t>(count) * part / parts),
          static_cast<int>(static_cast<int64_t>(count) * (part + 1) / parts)};
}

// Where a block of results goes, and what is added on the way.
struct Target {
  float* out;
  const float* residual;  // null: none
  const uint16_t* live;   // null: all lanes
  const float* bias;
  int64_t plane, shift;
  int columns, width;  // vectors and pixels of a row of pixels
  int most;            // vectors of a block
  Activation activation;
  float floor;  // of ReLU: 0; else -inf
  float slope;
  // of int8: where the sums of a row begin, its scale, and the largest magnitude of the inputs at
  // each position, or the same 16 for all
  const int32_t* zero;
  const float *scale, *range;
  int64_t range_step;

  float bias_of(int row) const { return bias != nullptr ? bias[row] : 0.0f; }
};

// One block of taps: the first starts from the bias, the others from what is stored, and the last
// adds what comes after the sum. A place has one group of rows.
struct Stage {
  const int64_t* start;
  const int32_t* order;  // the group at each place; null: as they are
  bool first, last;

  int group(int place) const { return order == nullptr ? place : order[place]; }
};

inline Vec kept(const Vec& v, int live) {
  alignas(64) static constexpr int32_t kBits[] = {1,   2,   4,    8,    16,   32,   64,    128,
                                                  256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return select((loaded<IntVec>(kBits) & live) != 0, v, Vec{});
}

// The same address, as if it were new: else every vector's own is kept from the first use to the last.
template <typename T>
inline T* again(T* p) {
  asm("" : "+r"(p));
  return p;
}

// The sums of a row begin.
template <typename K, int P>
SPARSEWORKS_INLINE void begin(const Target& to, const Stage& stage, int row, int64_t at,
                              Vec (&sum)[P]) {
  if (stage.first) {
    const Vec start = K::start(to, row);
#pragma GCC unroll 32
    for (int v = 0; v < P; ++v) sum[v] = start;
  } else {
    const float* from = again(to.out + row * to.plane + at);
#pragma GCC unroll 32
    for (int v = 0; v < P; ++v) sum[v] = load(from + v * kLanes);
  }
}

// ... and end as results, or wait for the next block.
template <typename K, int P>
SPARSEWORKS_INLINE void finish(const Target& to, const Stage& stage, int row, int64_t at,
                               int index, Vec (&sum)[P]) {
  const int64_t first = row * to.plane + at;
  if (stage.last) {
    K::complete(to, row, at, sum);
    if (to.residual != nullptr) {
      const float* other = again(to.residual + first);
#pragma GCC unroll 32
      for (int v = 0; v < P; ++v) sum[v] += load(other + v * kLanes);
    }
    const Vec floor = all(to.floor);
#pragma GCC unroll 32
    for (int v = 0; v < P; ++v) sum[v] = maximum(floor, sum[v]);
    if (to.live != nullptr) {
      const uint16_t* live = to.live + index;
#pragma GCC unroll 32
      for (int v = 0; v < P; ++v) sum[v] = kept(sum[v], live[v]);
    }
  }
  float* out = again(to.out + first);
#pragma GCC unroll 32
  for (int v = 0; v < P; ++v) store(out + v * kLanes, sum[v]);
}

// The other activations, on results that are still in the first cache.
inline void activate_stored(const Target& to, int row, int64_t at, int vectors) {
  float* p = to.out + row * to.plane + at;
  with_activation(to.activation, [&](auto a) {
    for (int v = 0; v < vectors; ++v)
      store(p + v * kLanes, activate<decltype(a)::value>(load(p + v * kLanes), to.slope));
  });
}

// The taps of the rows that come next: as many as these rows have.
template <typename N>
SPARSEWORKS_INLINE void fetch_ahead(const N& taps, const float* value, int64_t begin,
                                    int64_t end) {
  for (int64_t t = end; t < end + (end - begin); t += 16) {
    taps.fetch(t);
    __builtin_prefetch(value + t);
  }
}

// What taps read: at any distance ...
struct Listed {
  const int32_t* offset;
  Listed(const Taps& w, int) : offset(w.offset) {}
  const float* begin(const float* in) const { return in; }
  int64_t operator[](int64_t t) const { return offset[t]; }
  void fetch(int64_t t) const { __builtin_prefetch(offset + t); }
};

// ... or one position of inputs that follow each other, of which these are the first of a block.
struct Stepped {
  const uint16_t* column;
  int64_t step, first;
  Stepped(const Taps& w, int block)
      : column(w.column), step(w.step), first(w.near + block * w.width * w.step) {}
  const float* begin(const float* in) const { return in + first; }
  int64_t operator[](int64_t t) const { return column[t] * step; }
  void fetch(int64_t t) const { __builtin_prefetch(column + t); }
};

// How a kept weight meets a vector of positions; what a sum starts with, and what completes it.
struct Single {
  using Weight = Vec;
  static Vec start(const Target& to, int row) { return all(to.bias_of(row)); }
  template <int P>
  static void complete(const Target&, int, int64_t, Vec (&)[P]) {}
  static Weight weight(const float* value) { return all(*value); }
  static Vec add(Vec sum, Weight w, Vec x) { return sum + w * x; }
};

// A pair of bf16 weights, for two channels, meets positions that are pairs as well.
struct Paired : Single {
  using Weight = IntVec;
  static Weight weight(const float* value) {
    int bits;
    std::memcpy(&bits, value, sizeof bits);
    return all(bits);
  }
  static Vec add(Vec sum, Weight w, Vec x) {
#if defined(__AVX512BF16__)
    return as<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                  reinterpret_cast<__m512bh>(w),
                                                  reinterpret_cast<__m512bh>(x)));
#else
    const IntVec pair = as<IntVec>(x);
    const IntVec high = all(static_cast<int>(0xffff0000));
    sum += as<Vec>(w << 16) * as<Vec>(pair << 16);
    return sum + as<Vec>(w & high) * as<Vec>(pair & high);
#endif
  }
};

// Four int8 weights meet positions that are four bytes; sums are int32 until they are complete.
struct Quad {
  using Weight = Four;
  static Vec start(const Target& to, int row) {
    return as<Vec>(all(to.zero[row]));
  }
  static Weight weight(const float* value) {
    int bits;
    std::memcpy(&bits, value, sizeof bits);
    return Four(bits);
  }
  static Vec add(Vec sum, const Weight& w, Vec x) {
    return as<Vec>(
        w.added(as<IntVec>(sum), as<IntVec>(x)));
  }
  template <int P>
  static void complete(const Target& to, int row, int64_t at, Vec (&sum)[P]) {
    const Vec scale = all(to.scale[row]), bias = all(to.bias_of(row));
    const float* range = again(to.range + to.range_step * at);
#pragma GCC unroll 32
    for (int v = 0; v < P; ++v) {
      const Vec counted = converted<Vec>(as<IntVec>(sum[v]));
      sum[v] = counted * (scale * load(range + to.range_step * v * kLanes)) + bias;
    }
  }
};

template <typename K, int P, int S, typename N>
SPARSEWORKS_INLINE void accumulate(const float* in, const N& taps, const float* value,
                                   int64_t begin, int64_t end, Vec (&acc)[P]) {
  for (int64_t t = begin; t < end; ++t) {
    const float* x = again(in + taps[t]);
    const auto w = K::weight(value + t);
#pragma GCC unroll 32
    for (int v = 0; v < P; ++v) acc[v] = K::add(acc[v], w, load(x + v * S * kLanes));
  }
}

// One row, P vectors.
template <typename K, typename N, int P, int S>
void one_row(const Taps& w, const N& near, const Stage& stage, int place, const float* in,
             int64_t at, int index, const Target& target) {
  const Target to = target;  // a copy, which stores cannot change
  const int row = stage.group(place);
  Vec acc[P];
  begin<K>(to, stage, row, at, acc);
  const int64_t first = stage.start[place], last = stage.start[place + 1];
  const N taps = near;
  fetch_ahead(taps, w.value, first, last);
  accumulate<K, P, S>(in, taps, w.value, first, last, acc);
  finish<K>(to, stage, row, at, index, acc);
}

// Two rows at once, so that few positions still fill the pipeline.
template <typename K, typename N, int P, int S>
void two_rows(const Taps& w, const N& near, const Stage& stage, int place, const float* in,
              int64_t at, int index, const Target& target) {
  const Target to = target;
  const int row = stage.group(place), next = stage.group(place + 1);
  Vec a[P], b[P];
  begin<K>(to, stage, row, at, a);
  begin<K>(to, stage, next, at, b);
  int64_t i = stage.start[place], j = stage.start[place + 1];
  const int64_t i_end = j, j_end = stage.start[place + 2];
  const int64_t both = std::min(i_end - i, j_end - j);
  const N taps = near;
  fetch_ahead(taps, w.value, i, j_end);
  for (int64_t n = 0; n < both; ++n, ++i, ++j) {
    const float* x = again(in + taps[i]);
    const float* y = again(in + taps[j]);
    const auto s = K::weight(w.value + i), t = K::weight(w.value + j);
#pragma GCC unroll 32
    for (int v = 0; v < P; ++v) a[v] = K::add(a[v], s, load(x + v * S * kLanes));
#pragma GCC unroll 32
    for (int v = 0; v < P; ++v) b[v] = K::add(b[v], t, load(y + v * S * kLanes));
  }
  accumulate<K, P, S>(in, taps, w.value, i, i_end, a);
  accumulate<K, P, S>(in, taps, w.value, j, j_end, b);
  finish<K>(to, stage, row, at, index, a);
  finish<K>(to, stage, next, at, index, b);
}

// G rows that share their taps: one load serves G products. For weights that are nearly dense.
template <typename K, typename N, int G, int P, int S>
void shared_taps(const Taps& w, const N& near, const Stage& stage, int place, const float* in,
                 int64_t at, int index, const Target& target) {
  const Target to = target;
  Vec acc[G][P] = {};
  const int first = stage.group(place) * G;
#pragma GCC unroll 32
  for (int g = 0; g < G; ++g)
    if (first + g < w.rows) begin<K>(to, stage, first + g, at, acc[g]);
  const int64_t end = stage.start[place + 1];
  const N taps = near;
  for (int64_t t = stage.start[place]; t < end; ++t) {
    const float* x = again(in + taps[t]);
    const float* value = w.value + t * G;
#pragma GCC unroll 32
    for (int v = 0; v < P; ++v) {
      const Vec run = load(x + v * S * kLanes);
#pragma GCC unroll 32
      for (int g = 0; g < G; ++g) acc[g][v] = K::add(acc[g][v], K::weight(value + g), run);
    }
  }
#pragma GCC unroll 32
  for (int g = 0; g < G; ++g)
    if (first + g < w.rows) finish<K>(to, stage, first + g, at, index, acc[g]);
}

// All groups [begin, end) on one block of P vectors.
template <typename K, typename N, int G, int P, int S>
void block(const Taps& w, int begin, int end, const float* in, int64_t at, int index,
           const Target& to) {
  const int groups = (w.rows + G - 1) / G;
  for (int from = begin; from < end; from += Taps::kTogether) {
    const int until = std::min(end, from + Taps::kTogether);
    for (int b = 0; b < w.blocks; ++b) {
      const int64_t places = static_cast<int64_t>(b) * groups;
      const Stage stage{w.start + places, w.order == nullptr ? nullptr : w.order + places, b == 0,
                        b + 1 == w.blocks};
      const N near(w, b);
      const float* inputs = near.begin(in);
      int g = from;
      if constexpr (G > 1) {
        for (; g < until; ++g) shared_taps<K, N, G, P, S>(w, near, stage, g, inputs, at, index, to);
      } else {
        if constexpr (P <= kPair)
          for (; g + 2 <= until; g += 2) two_rows<K, N, P, S>(w, near, stage, g, inputs, at, index, to);
        for (; g < until; ++g) one_row<K, N, P, S>(w, near, stage, g, inputs, at, index, to);
      }
    }
  }
  if (to.activation != Activation::kNone)
    for (int row = begin * G; row < std::min(end * G, w.rows); ++row)
      activate_stored(to, row, at, P);
}

template <typename K, typename N, int G, int P, int S>
void block_of(int vectors, const Taps& w, int begin, int end, const float* in, int64_t at,
              int index, const Target& to) {
  if (vectors == P) return block<K, N, G, P, S>(w, begin, end, in, at, index, to);
  if constexpr (P > 1) block_of<K, N, G, P - 1, S>(vectors, w, begin, end, in, at, index, to);
}

}  // namespace
}  // namespace sparseworks
