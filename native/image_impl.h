// Windows and means over pixels, and norms over those of groups of channels.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "planes_impl.h"

namespace sparseworks {
namespace {

// out[x] = f(out[x], in[x stride]) for `count` pixels.
template <typename F>
inline void fold_row(const float* in, int stride, int lanes, int count, float* out, const F& f) {
  int x = 0;
  if (lanes == kLanes)
    for (; x < count; ++x) store(out + x * kLanes, f(load(out + x * kLanes), load(in + x * stride * kLanes)));
  if (stride == 1)
    for (; x + kLanes <= count; x += kLanes) store(out + x, f(load(out + x), load(in + x)));
  if (stride == 2)
    for (; x + kLanes <= count; x += kLanes) store(out + x, f(load(out + x), every_second(in + 2 * x)));
  for (; x < count; ++x) out[x] = first(f(all(out[x]), all(in[x * stride])));
}

// Windows that reach over the edge take what is there; an average divides by what it took, or by
// the whole window where padding counts.
template <bool Largest>
void pool_of(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry &from = op.from, &to = op.to;
  const int lanes = from.lanes, wide = from.width * lanes;
  const auto f = [](Vec a, Vec b) {  // the largest, or what is not a number
    return Largest ? select((a > b) | (a != a), a, b) : a + b;
  };
  const float none = Largest ? -std::numeric_limits<float>::infinity() : 0.0f;
  // one row of windows, already folded in the other direction, between what lies beyond the edges
  thread_local std::vector<float> memory;
  memory.assign((from.width + 2 * op.padding + op.window + op.stride) * lanes + 2 * kLanes, none);
  float* folded = memory.data() + op.padding * lanes;
  // pixels that a window at `at` of a row or column of `size` is divided by
  const auto counted = [&](int at, int size) {
    const int first = at * op.stride - op.padding, last = first + op.window;
    return op.broadcast ? std::min(last, size + op.padding) - first
                        : std::min(last, size) - std::max(first, 0);
  };
  const auto [begin, end] = share(to.bands * op.channels, part, parts);
  for (int i = begin; i < end; ++i) {
    const int c = i % op.channels, above = i / op.channels * to.rows();
    float* plane = plane_at(arena + where[op.out], op, to, op.channels, i);
    clear_padding(plane, to, true);
    for (int y = 0; y < to.rows(); ++y) {
      const int top = (above + y) * op.stride - op.padding;
      std::fill_n(folded, wide, none);
      for (int v = std::max(top, 0); v < std::min(top + op.window, from.height); ++v) {
        const float* row = row_at(arena + where[op.in], op, from, c, v);
        fold_row(row, 1, 1, wide, folded, f);
      }
      float* out = plane + to.origin + y * to.pitch;
      std::fill_n(out, to.width * lanes, none);
      for (int u = 0; u < op.window; ++u)
        fold_row(memory.data() + u * lanes, op.stride, lanes, to.width, out, f);
      if constexpr (!Largest)
        for (int x = 0; x < to.width; ++x) {
          const float factor =
              1.0f / (counted(above + y, from.height) * counted(x, from.width));
          for (int l = 0; l < lanes; ++l) out[x * lanes + l] *= factor;
        }
    }
  }
}

void pool(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  if (op.flag) pool_of<true>(op, where, arena, part, parts);
  else pool_of<false>(op, where, arena, part, parts);
}

void mean(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry &from = op.from, &to = op.to;
  const auto [begin, end] = share(op.channels, part, parts);
  const float factor = 1.0f / (static_cast<float>(from.height) * from.width);
  for (int c = begin; c < end; ++c) {
    float sum[kLanes];
    const int64_t width = static_cast<int64_t>(from.width) * from.lanes;
    Vec total{};
    for (int y = 0; y < from.height; ++y) {
      const float* row = row_at(arena + where[op.in], op, from, c, y);
      int64_t x = 0;
      for (; x + kLanes <= width; x += kLanes) total += load(row + x);
      if (x < width) total += kept(load(row + x), (1 << (width - x)) - 1);
    }
    store(sum, total);
    if (from.lanes == 1) sum[0] = std::accumulate(sum, sum + kLanes, 0.0f);
    float* out = arena + where[op.out] + c * to.plane;
    std::fill(out, out + to.plane, 0.0f);
    for (int i = 0; i < from.lanes; ++i) out[to.origin + i] = sum[i] * factor;
  }
}

// Calls f(row, n, live) for every vector of the pixels of a plane; n lanes of it are pixels.
template <typename T, typename F>
inline void each_vector(T* plane, const Geometry& g, const F& f) {
  const int64_t width = static_cast<int64_t>(g.width) * g.lanes;
  for (int y = 0; y < g.height; ++y) {
    T* row = plane + g.origin + y * g.pitch;
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) f(row + x, x + (row - plane), kLanes);
    if (x < width) f(row + x, x + (row - plane), static_cast<int>(width - x));
  }
}

inline Vec first_lanes(Vec v, int n) { return n == kLanes ? v : kept(v, (1 << n) - 1); }

inline void store_first(float* p, Vec v, int n) {
  if (n == kLanes) return store(p, v);
  float at[kLanes];
  store(at, v);
  std::copy_n(at, n, p);
}

// y = (x - mean) / sqrt(variance + epsilon) * gamma + beta, mean and variance over the pixels of a
// group of channels.
void group_norm(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry& g = op.to;
  const int size = op.channels / op.groups;
  const float count = static_cast<float>(size) * g.height * g.width;
  const auto summed = [&](Vec v) {  // of images side by side each has its own
    return g.lanes > 1 ? v : all(sum_of(v));
  };
  const auto [begin, end] = share(op.groups, part, parts);
  for (int group = begin; group < end; ++group) {
    const float* in = arena + where[op.in] + static_cast<int64_t>(group) * size * g.plane;
    Vec mean{}, square{};
    for (int c = 0; c < size; ++c)
      each_vector(in + c * g.plane, g,
                  [&](const float* x, int64_t, int n) { mean += first_lanes(load(x), n); });
    mean = summed(mean) * (1.0f / count);
    for (int c = 0; c < size; ++c)
      each_vector(in + c * g.plane, g, [&](const float* x, int64_t, int n) {
        const Vec d = first_lanes(load(x) - mean, n);
        square += d * d;
      });
    const Vec inverse = inverse_root(summed(square) * (1.0f / count) + op.number);
    for (int c = 0; c < size; ++c) {
      const int channel = group * size + c;
      const float gamma = op.scale ? op.scale[channel] : 1.0f;
      const float beta = op.bias ? op.bias[channel] : 0.0f;
      const Vec a = inverse * gamma, b = beta - mean * a;
      float* out = arena + where[op.out] + channel * g.plane;
      clear_padding(out, g, true);
      each_vector(in + c * g.plane, g, [&](const float* x, int64_t at, int n) {
        store_first(out + at, load(x) * a + b, n);
      });
    }
  }
}

}  // namespace
}  // namespace sparseworks
