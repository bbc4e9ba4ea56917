// softmax(scale q k^T + mask) v and layer norm on [channel][token], one token (query) per lane.
#pragma once

#include <algorithm>
#include <limits>

#include "image_impl.h"

namespace sparseworks {
namespace {

#if defined(__AVX512F__)
constexpr int kQueries = 4;  // vectors of queries at once
constexpr int kBlock = 4;    // keys, or channels of v, at once
#else
constexpr int kQueries = 2;
constexpr int kBlock = 2;
#endif

// acc[i][v] = sum over n of a[n * a_step + i * a_next] * b[n * b_step + v * 16]
template <int M, int V>
inline void multiply(const float* a, int64_t a_step, int64_t a_next, const float* b,
                     int64_t b_step, int n, Vec (&acc)[M][V]) {
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) acc[i][v] = Vec{};
  for (int t = 0; t < n; ++t)
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) {
      const Vec x = load(b + t * b_step + v * kLanes);
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i) acc[i][v] += a[t * a_step + i * a_next] * x;
    }
}

// scores [key][V vectors of queries] of one head.
template <int V>
void scores_of(const float* q, const float* k, int64_t q_plane, int64_t k_plane, int size,
               int keys, float scale, float* scores) {
  int key = 0;
  for (; key + kBlock <= keys; key += kBlock) {
    Vec acc[kBlock][V];
    multiply<kBlock, V>(k + key, k_plane, 1, q, q_plane, size, acc);
#pragma GCC unroll 32
    for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) store(scores + (key + i) * V * kLanes + v * kLanes, acc[i][v] * scale);
  }
  for (; key < keys; ++key) {
    Vec acc[1][V];
    multiply<1, V>(k + key, k_plane, 1, q, q_plane, size, acc);
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) store(scores + key * V * kLanes + v * kLanes, acc[0][v] * scale);
  }
}

// Adds mask[key], or mask[key][query] where `step` is the distance between keys.
template <int V>
void add_mask(const float* mask, int64_t step, int keys, float* scores) {
  for (int key = 0; key < keys; ++key)
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) {
      float* s = scores + (key * V + v) * kLanes;
      store(s, load(s) + (step == 0 ? all(mask[key]) : load(mask + key * step + v * kLanes)));
    }
}

// Adds bias[query][key], for `queries` of them; lanes beyond are left.
template <int V>
void add_bias(const float* bias, int keys, int queries, float* scores) {
  alignas(64) float turned[kLanes * kLanes];
  for (int v = 0; v < V; ++v) {
    const int count = std::min(kLanes, queries - v * kLanes);
    const float* from = bias + static_cast<int64_t>(v) * kLanes * keys;
    int key = 0;
    for (; count == kLanes && key + kLanes <= keys; key += kLanes) {
      transpose16(from + key, keys, turned, kLanes);
      for (int i = 0; i < kLanes; ++i) {
        float* s = scores + ((key + i) * V + v) * kLanes;
        store(s, load(s) + load(turned + i * kLanes));
      }
    }
    for (; key < keys; ++key)
      for (int i = 0; i < count; ++i) scores[(key * V + v) * kLanes + i] += from[i * keys + key];
  }
}

// What one block of queries sees.
struct Sight {
  const float *q, *k, *v;
  float* out;
  const float* mask;  // null: none; with `mask_step` floats from one key to the next, or 0
  int64_t mask_step;
  const float* bias;  // null: none
  int first, queries;  // place of the first query in its window, and how many there are from there
};

// Whole vectors, but what lies behind the last query of a window belongs to the next one.
inline void store_queries(float* p, Vec v, int queries, bool whole) {
  if (whole || queries >= kLanes) return store(p, v);
  float at[kLanes];
  store(at, v);
  std::copy_n(at, queries, p);
}

template <int V>
void attend(const Op& op, const Sight& s, float* scores) {
  const int size = op.window;
  const bool whole = op.windows == 1;
  scores_of<V>(s.q, s.k, op.from.plane, op.to.plane, size, op.keys, op.number, scores);
  if (s.mask != nullptr) add_mask<V>(s.mask, s.mask_step, op.keys, scores);
  if (s.bias != nullptr) add_bias<V>(s.bias, op.keys, s.queries, scores);
  if (op.flag)  // causal: a query sees the keys up to its own place
    for (int key = 0; key < op.keys; ++key)
#pragma GCC unroll 32
      for (int i = 0; i < V * kLanes; ++i)
        if (key > s.first + i) scores[key * V * kLanes + i] = -std::numeric_limits<float>::infinity();
  Vec sum[V];
#pragma GCC unroll 32
  for (int j = 0; j < V; ++j) {
    Vec top = load(scores + j * kLanes);
    for (int key = 1; key < op.keys; ++key) top = maximum(top, load(scores + (key * V + j) * kLanes));
    top = maximum(top, all(-std::numeric_limits<float>::max()));
    sum[j] = Vec{};
    for (int key = 0; key < op.keys; ++key) {
      float* p = scores + (key * V + j) * kLanes;
      const Vec e = exponential(load(p) - top);
      store(p, e);
      sum[j] += e;
    }
  }
#pragma GCC unroll 32
  for (int j = 0; j < V; ++j) sum[j] = 1.0f / sum[j];
  int c = 0;
  for (; c + kBlock <= size; c += kBlock) {
    Vec acc[kBlock][V];
    multiply<kBlock, V>(s.v + c * op.to.plane, 1, op.to.plane, scores, V * kLanes, op.keys, acc);
#pragma GCC unroll 32
    for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 32
      for (int j = 0; j < V; ++j)
        store_queries(s.out + (c + i) * op.from.plane + j * kLanes, acc[i][j] * sum[j],
                      s.queries - j * kLanes, whole);
  }
  for (; c < size; ++c) {
    Vec acc[1][V];
    multiply<1, V>(s.v + c * op.to.plane, 1, op.to.plane, scores, V * kLanes, op.keys, acc);
#pragma GCC unroll 32
    for (int j = 0; j < V; ++j)
      store_queries(s.out + c * op.from.plane + j * kLanes, acc[0][j] * sum[j],
                    s.queries - j * kLanes, whole);
  }
}

template <int V>
void attend_of(int vectors, const Op& op, const Sight& sight, float* scores) {
  if (vectors == V) return attend<V>(op, sight, scores);
  if constexpr (V > 1) attend_of<V - 1>(vectors, op, sight, scores);
}

// `window` channels a head; `from` is the geometry of queries, `to` of keys.
void attention(const Op& op, const int64_t* where, float* arena, const Call& call, int64_t item,
               int part, int parts) {
  thread_local std::vector<float> memory;
  const size_t needed = static_cast<size_t>(op.keys) * kQueries * kLanes + kLanes;
  if (memory.size() < needed) memory.resize(needed);
  float* scores = reinterpret_cast<float*>(
      (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  const int shared = op.heads / op.groups, size = op.window, queries = op.from.width / op.windows;
  const auto given = [&](int tensor) {
    return tensor < 0 || call.tensors[tensor].size == 0 ? nullptr : &call.tensors[tensor];
  };
  const Tensor *mask = given(op.mask), *bias = given(op.added);
  const int64_t step =
      mask == nullptr || mask->size == op.keys ? 0 : (queries + kLanes - 1) / kLanes * kLanes;
  const int vectors = (queries + kLanes - 1) / kLanes;
  const int blocks = (vectors + kQueries - 1) / kQueries, work = op.windows * op.heads * blocks;
  for (int w = work * part / parts; w < work * (part + 1) / parts; ++w) {
    const int window = w / blocks / op.heads, head = w / blocks % op.heads;
    const int first = w % blocks * kQueries, from = window * queries + first * kLanes;
    Sight s{};
    s.first = first * kLanes;
    s.queries = queries - s.first;
    s.q = arena + where[op.in] + (op.q + head * size) * op.from.plane + from;
    s.k = arena + where[op.other] + (op.k + head / shared * size) * op.to.plane + window * op.keys;
    s.v = arena + where[op.extra] + (op.v + head / shared * size) * op.to.plane + window * op.keys;
    s.out = arena + where[op.out] + head * size * op.from.plane + from;
    if (mask != nullptr) {
      const int64_t entry = item * op.windows + window;
      s.mask = mask->data + entry % mask->items * mask->size + (step == 0 ? 0 : s.first);
      s.mask_step = step;
    }
    if (bias != nullptr) {
      const int64_t entry = bias->items == 1 ? 0 : item, each = static_cast<int64_t>(queries) * op.keys;
      s.bias = bias->data + entry * bias->size + head * each + s.first * op.keys;
    }
    attend_of<kQueries>(std::min(kQueries, vectors - first), op, s, scores);
  }
}

// Layer norm of images: rows of pixels, and zeros around them.
void norm_pixels(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry& g = op.to;
  const int rows = g.rows(), all_rows = g.height;
  const int begin = all_rows * part / parts, end = all_rows * (part + 1) / parts;
  const int64_t width = static_cast<int64_t>(g.width) * g.lanes;
  for (int y = begin; y < end; ++y) {
    const int64_t row = y / rows * op.apart + g.origin + y % rows * g.pitch;
    for (int64_t at = 0; at < width; at += kLanes) {
      const float* x = arena + where[op.in] + row + at;
      float* out = arena + where[op.out] + row + at;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, width - at));
      Vec mean{}, square{};
      if (!op.flag)
        for (int c = 0; c < op.channels; ++c) mean += load(x + c * g.plane);
      mean *= 1.0f / op.channels;
      for (int c = 0; c < op.channels; ++c) {
        const Vec d = load(x + c * g.plane) - mean;
        square += d * d;
      }
      const Vec inverse = inverse_root(square * (1.0f / op.channels) + op.number);
      for (int c = 0; c < op.channels; ++c) {
        const float gamma = op.scale ? op.scale[c] : 1.0f, beta = op.bias ? op.bias[c] : 0.0f;
        store_first(out + c * g.plane, (load(x + c * g.plane) - mean) * (inverse * gamma) + beta, n);
      }
    }
  }
  const int planes = g.bands * op.channels;
  for (int i = planes * part / parts; i < planes * (part + 1) / parts; ++i)
    clear_padding(plane_at(arena + where[op.out], op, g, op.channels, i), g, true);
}

// y = (x - mean) / sqrt(variance + epsilon) * gamma + beta over the channels of each position; with
// `flag` by the root mean square alone, mean = 0.
void norm(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  if (op.to.height > 1 || op.to.lanes > 1 || op.to.pad > 0)
    return norm_pixels(op, where, arena, part, parts);
  const int64_t plane = op.to.plane;
  const int vectors = static_cast<int>((op.to.width + kLanes - 1) / kLanes);
  for (int j = vectors * part / parts; j < vectors * (part + 1) / parts; ++j) {
    const float* x = arena + where[op.in] + j * kLanes;
    float* y = arena + where[op.out] + j * kLanes;
    Vec mean{}, square{};
    if (!op.flag)
      for (int c = 0; c < op.channels; ++c) mean += load(x + c * plane);
    mean *= 1.0f / op.channels;
    for (int c = 0; c < op.channels; ++c) {
      const Vec d = load(x + c * plane) - mean;
      square += d * d;
    }
    const Vec inverse = inverse_root(square * (1.0f / op.channels) + op.number);
    for (int c = 0; c < op.channels; ++c) {
      const float gamma = op.scale ? op.scale[c] : 1.0f, beta = op.bias ? op.bias[c] : 0.0f;
      store(y + c * plane, (load(x + c * plane) - mean) * (inverse * gamma) + beta);
    }
  }
}

}  // namespace
}  // namespace sparseworks
