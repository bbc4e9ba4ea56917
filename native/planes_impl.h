// Operations on whole planes: sums, copies, other places, words of several channels.
#pragma once

#include <algorithm>

#include "tensors_impl.h"

namespace sparseworks {
namespace {

// out[x] = in[2 x], for x in [0, 16)
inline Vec every_second(const float* in) { return evens(load(in), load(in + kLanes)); }

// activation(a + b), activation(a b) or activation(a), on whole planes.
void combine(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry& g = op.to;
  const auto [begin, end] = share(g.bands * op.channels, part, parts);
  with_activation(op.activation, [&](auto a) {
    constexpr Activation A = decltype(a)::value;
    for (int i = begin; i < end; ++i) {
      const float* x = plane_at(arena + where[op.in], op, g, op.channels, i);
      float* out = plane_at(arena + where[op.out], op, g, op.channels, i);
      const int other = op.broadcast ? i % op.channels : i;
      const float* y = op.other < 0 ? nullptr
                                    : plane_at(arena + where[op.other], op, op.from, op.channels, other);
      for (int64_t p = 0; p < g.plane; p += kLanes) {
        Vec v = load(x + p);
        if (y != nullptr) {
          const Vec w = !op.broadcast ? load(y + p) : op.from.lanes == 1 ? all(y[0]) : load(y);
          v = op.flag ? v * w : v + w;
        }
        store(out + p, activate<A>(v, op.number));
      }
      if (op.broadcast || A != Activation::kNone) clear_padding(out, g, true);
    }
  });
}

// Whole planes, from channel q of `in` on, to channel k of `out` on.
void gather(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const int64_t plane = op.to.plane;
  const auto [begin, end] = share(op.to.bands * op.channels, part, parts);
  for (int i = begin; i < end; ++i) {
    const float* in = plane_at(arena + where[op.in] + op.q * plane, op, op.to, op.channels, i);
    float* out = plane_at(arena + where[op.out] + op.k * plane, op, op.to, op.channels, i);
    std::copy_n(in, plane, out);
  }
}

// out[y][x] = in[y / factor][x / factor]
void upsample(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry &from = op.from, &to = op.to;
  const auto [begin, end] = share(to.bands * op.channels, part, parts);
  for (int i = begin; i < end; ++i) {
    const int c = i % op.channels, above = i / op.channels * to.rows();
    float* out = plane_at(arena + where[op.out], op, to, op.channels, i);
    clear_padding(out, to, true);
    for (int y = 0; y < to.rows(); ++y) {
      const float* row = row_at(arena + where[op.in], op, from, c, (above + y) / op.window);
      float* o = out + to.origin + y * to.pitch;
      for (int x = 0; x < to.width; ++x)
        std::copy_n(row + x / op.window * to.lanes, to.lanes, o + x * to.lanes);
    }
  }
}

// Positions of some channels to positions of others; planes in one band.
void move(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Moves& m = op.moves;
  const int lanes = op.to.lanes;
  const auto [begin, end] = share(op.channels, part, parts);
  for (int c = begin; c < end; ++c) {
    const float* in = arena + where[op.in] + (op.q + c * op.q_step) * op.from.plane;
    float* out = arena + where[op.out] + (op.k + c * op.k_step) * op.to.plane;
    if (op.flag) std::fill_n(out, op.to.plane, 0.0f);
    if (m.weight != nullptr) {
      for (int i = 0; i < m.count; ++i) {
        const float* weight = m.weight + i * m.taps;
        const int32_t* from = m.from + i * m.taps;
        if (lanes == 1) {
          float sum = 0.0f;
          for (int t = 0; t < m.taps; ++t) sum += weight[t] * in[from[t]];
          out[m.to[i]] = sum;
        } else {
          Vec sum{};
          for (int t = 0; t < m.taps; ++t) sum += weight[t] * load(in + from[t]);
          store(out + m.to[i], sum);
        }
      }
    } else if (lanes == 1) {
      for (int i = 0; i < m.count; ++i) out[m.to[i]] = in[m.from[i]];
    } else {
      for (int i = 0; i < m.count; ++i) store(out + m.to[i], load(in + m.from[i]));
    }
  }
}

// Channels 2 c and 2 c + 1 side by side, rounded to bf16; a missing one is zero. A channel has
// `window` planes (its phases), and there may be shifted copies of all words.
void pairs(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const int64_t plane = op.to.plane;
  const int inner = op.window, count = (op.channels + 1) / 2 * inner;
  const auto [begin, end] = share(op.to.bands * count, part, parts);
  for (int i = begin; i < end; ++i) {
    const auto [a, there] = channels_of_word(op, arena + where[op.in], 2, i);
    const float* b = there > 1 ? a + inner * plane : nullptr;
    float* out = plane_at(arena + where[op.out], op, op.to, count, i);
    for (int64_t p = 0; p < plane; p += kLanes)
      store(out + p, paired(load(a + p), b == nullptr ? Vec{} : load(b + p)));
    if (op.shift > 0) shift_words(out, op.to, op.shift, Vec{});
  }
}

inline void every_second(const float* in, int count, float* out) {
  int x = 0;
  for (; x + kLanes <= count; x += kLanes) store(out + x, every_second(in + 2 * x));
  for (; x < count; ++x) out[x] = in[2 * x];
}

// Plane (c, py, px) holds the pixels (y stride + py, x stride + px) of channel c; with copies that
// are moved by one pixel to either side where the others have no padding beside them.
void phases(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry &from = op.from, &to = op.to;
  const int s = op.stride, lanes = to.lanes;
  const auto [begin, end] = share(to.bands * op.channels, part, parts);  // channels of `in`
  for (int i = begin; i < end; ++i)
    for (int phase = 0; phase < s * s; ++phase) {
      const int c = i % op.channels, above = i / op.channels * to.rows();
      float* out = plane_at(arena + where[op.out], op, to, op.channels * s * s, i * s * s + phase);
      const int py = phase / s, px = phase % s;
      const int height = (from.height - py + s - 1) / s;  // that the input has of this phase
      const int width = std::max(0, (from.width - px + s - 1) / s);
      clear_padding(out, to, true);
      for (int y = 0; y < to.rows(); ++y) {
        float* row = out + to.origin + y * to.pitch;
        const int count = above + y < height ? width : 0;
        const float* source =
            row_at(arena + where[op.in], op, from, c, (above + y) * s + py) + px * lanes;
        if (s == 2 && lanes == 1) every_second(source, count, row);
        else
          for (int x = 0; x < count; ++x) std::copy_n(source + x * s * lanes, lanes, row + x * lanes);
        std::fill(row + count * lanes, row + to.width * lanes, 0.0f);
      }
      if (op.shift == 0) continue;
      for (int copy = 1; copy < 3; ++copy) clear_padding(out + copy * op.shift, to, false);
      const int columns = static_cast<int>(to.pitch / kLanes);
      shift_run(out + to.origin, op.shift, 0, to.rows() * columns, columns, to.width);
    }
}

}  // namespace
}  // namespace sparseworks
