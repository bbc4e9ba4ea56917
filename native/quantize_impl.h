// From fp32 to int8: one scale for every token, or for every image.
#pragma once

#include <algorithm>

#include "int8.h"
#include "product_impl.h"

namespace sparseworks {
namespace {

constexpr int kStrip = 8;  // vectors of positions that are done together

// Of N vectors of positions: the largest magnitude over all channels.
template <int N>
void range_of_tokens(const float* in, int channels, int64_t plane, float* out) {
  IntVec most[N] = {};
  for (int c = 0; c < channels; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v)
      most[v] = larger(most[v], magnitude(load(in + c * plane + v * kLanes)));
  for (int v = 0; v < N; ++v) store(out + v * kLanes, as<Vec>(most[v]));
}

// The largest magnitudes of a value: of each token, or of 16 images or the lanes of one, where a
// piece of the channels has a slot.
void range(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry& g = op.from;
  const float* in = arena + where[op.in];
  float* out = arena + where[op.out];
  if (op.slots == 0) {
    auto [v, end] = share(static_cast<int>(g.plane / kLanes), part, parts);
    for (; v + kStrip <= end; v += kStrip)
      range_of_tokens<kStrip>(in + v * kLanes, op.channels, g.plane, out + v * kLanes);
    for (; v < end; ++v)
      range_of_tokens<1>(in + v * kLanes, op.channels, g.plane, out + v * kLanes);
    return;
  }
  const auto [first, last] = share(op.slots, part, parts);
  const int width = g.width * g.lanes, rest = width % kLanes;
  for (int slot = first; slot < last; ++slot) {
    const auto [begin, end] = share(g.bands * op.channels, slot, op.slots);
    IntVec most{};
    for (int i = begin; i < end; ++i)
      for (int y = 0; y < g.rows(); ++y) {
        const float* row = plane_at(in, op, g, op.channels, i) + g.origin + y * g.pitch;
        int x = 0;
        for (; x + kLanes <= width; x += kLanes) most = larger(most, magnitude(load(row + x)));
        if (rest > 0) most = larger(most, magnitude(kept(load(row + x), (1 << rest) - 1)));
      }
    store(out + slot * kLanes, as<Vec>(most));
  }
}

// Channels 4 c to 4 c + 3 as the bytes of a word, rounded to int8 and moved by 128; missing ones are
// zero. A channel has `window` planes (its phases), and there may be shifted copies of all words.
void quads(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const int64_t plane = op.to.plane;
  const int inner = op.window, count = (op.channels + 3) / 4 * inner;
  const auto [begin, end] = share(op.to.bands * count, part, parts);
  const float* range = arena + where[op.extra];
  float* out = arena + where[op.out];
  const Bits zero = Bits{} + kZeros;
  const Vec shared = op.slots == 0 ? Vec{} : steps(range_of(range, op.slots, op.to.lanes));
  for (int64_t first = 0; first < plane; first += kStrip * kLanes) {
    const int vectors = static_cast<int>(std::min<int64_t>(kStrip, (plane - first) / kLanes));
    Vec step[kStrip];
    for (int v = 0; v < vectors; ++v)
      step[v] = op.slots == 0 ? steps(load(range + first + v * kLanes)) : shared;
    for (int i = begin; i < end; ++i) {
      const auto [plane_of_word, there] = channels_of_word(op, arena + where[op.in], 4, i);
      const float* in = plane_of_word + first;
      float* words = plane_at(out, op, op.to, count, i) + first;
      const auto write = [&](auto four) {
        for (int v = 0; v < vectors; ++v) {
          Bits word = zero;
          for (int k = 0; k < (four() ? 4 : there); ++k)
            word += whole(load(in + k * inner * plane + v * kLanes) * step[v]) << 8 * k;
          store(words + v * kLanes, as<Vec>(word));
        }
      };
      if (there == 4) write(std::true_type{});
      else write(std::false_type{});
    }
  }
  if (op.shift > 0)
    for (int i = begin; i < end; ++i)
      shift_words(plane_at(out, op, op.to, count, i), op.to, op.shift, as<Vec>(zero));
}

}  // namespace
}  // namespace sparseworks
