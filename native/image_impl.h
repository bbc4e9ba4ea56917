// Between the tensors of a caller and the planes of a program, and the plain operations on planes.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "product_impl.h"

namespace sparseworks {
namespace {

// out[c][r] = in[r][c]
void transpose(const float* in, int64_t in_stride, int rows, int columns, float* out,
               int64_t out_stride) {
  int r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    int c = 0;
    for (; c + kLanes <= columns; c += kLanes)
      transpose16(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
    for (; c < columns; ++c)
      for (int i = r; i < r + kLanes; ++i) out[c * out_stride + i] = in[i * in_stride + c];
  }
  for (; r < rows; ++r)
    for (int c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
}

// Row y of the pixels of channel c.
template <typename T>
inline T* row_at(T* value, const Op& op, const Geometry& g, int c, int y) {
  const int rows = g.rows(), band = g.bands == 1 ? 0 : y / rows;
  return value + band * op.apart + c * g.plane + g.origin + (y - band * rows) * g.pitch;
}

// The first image of a group of 16; missing ones are read as the last one and never written.
inline int images(const Call& call, int64_t item) {
  return static_cast<int>(std::min<int64_t>(kLanes, call.entries - item * kLanes));
}

// Of the columns of a matrix: the first of an item, and how many there are from there.
inline std::pair<int64_t, int64_t> positions(const Geometry& g, const Tensor& t, int64_t item) {
  const int64_t first = item * g.width;
  return {first, std::min<int64_t>(g.width, t.size - first)};
}

void load_tensor(const Op& op, const int64_t* where, float* arena, const Call& call, int64_t item,
                 int part, int parts) {
  const Geometry& g = op.to;
  const Tensor& t = call.tensors[op.tensor];
  float* out = arena + where[op.out];
  const auto [begin, end] = share(op.channels, part, parts);
  if (op.layout == Layout::kColumns) {
    const auto [first, count] = positions(g, t, item);
    for (int c = begin; c < end; ++c) {
      std::copy_n(t.data + c * t.size + first, count, out + c * g.plane);
      std::fill(out + c * g.plane + count, out + (c + 1) * g.plane, 0.0f);
    }
    return;
  }
  if (op.layout == Layout::kTokens) {
    const float* in = t.data + (t.items == 1 ? 0 : item * t.size);
    for (int c = begin; c < end; c += 64) {
      const int count = std::min(64, end - c);
      transpose(in + c, op.channels, g.width, count, out + c * g.plane, g.plane);
      for (int k = c; k < c + count; ++k)
        std::fill(out + k * g.plane + g.width, out + (k + 1) * g.plane, 0.0f);
    }
    return;
  }
  const auto [first, last] = share(g.bands * op.channels, part, parts);
  for (int i = first; i < last; ++i) {
    float* plane = plane_at(out, op, g, op.channels, i);
    clear_padding(plane, g, true);
    const int c = i % op.channels, above = i / op.channels * g.rows();
    for (int y = 0; y < g.rows(); ++y) {
      const int64_t pixel = (static_cast<int64_t>(c) * g.height + above + y) * g.width;
      float* row = plane + g.origin + y * g.pitch;
      if (g.lanes == 1) {
        std::copy_n(t.data + item * t.size + pixel, g.width, row);
        continue;
      }
      const int count = images(call, item);
      const float* in = t.data + item * kLanes * t.size + pixel;
      if (count == kLanes) {
        transpose(in, t.size, kLanes, g.width, row, kLanes);
        continue;
      }
      for (int x = 0; x < g.width; ++x)
        for (int i = 0; i < kLanes; ++i)
          row[x * kLanes + i] = in[std::min(i, count - 1) * t.size + x];
    }
  }
}

void store_tensor(const Op& op, const int64_t* where, float* arena, const Call& call, int64_t item,
                  int part, int parts) {
  const Geometry& g = op.from;
  const Tensor& t = call.tensors[op.tensor];
  const float* in = arena + where[op.in];
  const auto [begin, end] = share(op.channels, part, parts);
  if (op.layout == Layout::kColumns) {
    const auto [first, count] = positions(g, t, item);
    for (int c = begin; c < end; ++c)
      std::copy_n(in + c * g.plane, count, t.data + c * t.size + first);
    return;
  }
  if (op.layout == Layout::kTokens) {
    float* out = t.data + item * t.size;
    for (int c = begin; c < end; c += 64)  // some lines of a row at a time
      for (int x = 0; x < g.width; x += kLanes)
        transpose(in + c * g.plane + x, g.plane, std::min(64, end - c), std::min(kLanes, g.width - x),
                  out + static_cast<int64_t>(x) * op.channels + c, op.channels);
    return;
  }
  for (int c = begin; c < end; ++c)
    for (int y = 0; y < g.height; ++y) {
      const int64_t pixel = (static_cast<int64_t>(c) * g.height + y) * g.width;
      const float* row = row_at(in, op, g, c, y);
      if (g.lanes == 1) {
        std::copy_n(row, g.width, t.data + item * t.size + pixel);
        continue;
      }
      float* out = t.data + item * kLanes * t.size + pixel;
      for (int i = 0; i < images(call, item); ++i)
        for (int x = 0; x < g.width; ++x) out[i * t.size + x] = row[x * kLanes + i];
    }
}

// out[x] = in[2 x], for x in [0, 16)
inline Vec every_second(const float* in) { return evens(load(in), load(in + kLanes)); }

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
