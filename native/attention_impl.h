// softmax(scale q k^T + mask) v and layer norm on [channel][token], one token (query) per lane.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "math.h"

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

template <int V>
void attend(const Op& op, const float* q, const float* k, const float* v, float* out,
            const float* mask, int64_t mask_step, int first, float* scores) {
  const int size = op.window;
  scores_of<V>(q, k, op.from.plane, op.to.plane, size, op.keys, op.number, scores);
  if (mask != nullptr) add_mask<V>(mask, mask_step, op.keys, scores);
  if (op.flag)  // causal: a query sees the keys up to its own place
    for (int key = 0; key < op.keys; ++key)
#pragma GCC unroll 32
      for (int i = 0; i < V * kLanes; ++i)
        if (key > first + i) scores[key * V * kLanes + i] = -std::numeric_limits<float>::infinity();
  Vec sum[V];
#pragma GCC unroll 32
  for (int j = 0; j < V; ++j) {
    Vec top = load(scores + j * kLanes);
    for (int key = 1; key < op.keys; ++key) top = maximum(top, load(scores + (key * V + j) * kLanes));
    top = maximum(top, all(-std::numeric_limits<float>::max()));
    sum[j] = Vec{};
    for (int key = 0; key < op.keys; ++key) {
      float* s = scores + (key * V + j) * kLanes;
      const Vec e = exponential(load(s) - top);
      store(s, e);
      sum[j] += e;
    }
  }
#pragma GCC unroll 32
  for (int j = 0; j < V; ++j) sum[j] = 1.0f / sum[j];
  int c = 0;
  for (; c + kBlock <= size; c += kBlock) {
    Vec acc[kBlock][V];
    multiply<kBlock, V>(v + c * op.to.plane, 1, op.to.plane, scores, V * kLanes, op.keys, acc);
#pragma GCC unroll 32
    for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 32
      for (int j = 0; j < V; ++j)
        store(out + (c + i) * op.from.plane + j * kLanes, acc[i][j] * sum[j]);
  }
  for (; c < size; ++c) {
    Vec acc[1][V];
    multiply<1, V>(v + c * op.to.plane, 1, op.to.plane, scores, V * kLanes, op.keys, acc);
#pragma GCC unroll 32
    for (int j = 0; j < V; ++j) store(out + c * op.from.plane + j * kLanes, acc[0][j] * sum[j]);
  }
}

template <int V>
void attend_of(int vectors, const Op& op, const float* q, const float* k, const float* v,
               float* out, const float* mask, int64_t mask_step, int first, float* scores) {
  if (vectors == V) return attend<V>(op, q, k, v, out, mask, mask_step, first, scores);
  if constexpr (V > 1) attend_of<V - 1>(vectors, op, q, k, v, out, mask, mask_step, first, scores);
}

// `window` channels a head; `from` is the geometry of queries, `to` of keys.
void attention(const Op& op, const int64_t* where, float* arena, const Call& call, int64_t item,
               int part, int parts) {
  thread_local std::vector<float> memory;
  const size_t needed = static_cast<size_t>(op.keys) * kQueries * kLanes + kLanes;
  if (memory.size() < needed) memory.resize(needed);
  float* scores = reinterpret_cast<float*>(
      (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  const int shared = op.heads / op.groups, size = op.window;
  const float* q = arena + where[op.in] + op.q * op.from.plane;
  const float* k = arena + where[op.other] + op.k * op.to.plane;
  const float* v = arena + where[op.extra] + op.v * op.to.plane;
  float* out = arena + where[op.out];
  const float* mask = nullptr;
  int64_t step = 0;
  if (op.mask >= 0) {
    const Tensor& t = call.tensors[op.mask];
    if (t.size > 0) mask = t.data + (t.items == 1 ? 0 : item * t.size);
    step = t.size == op.keys ? 0 : (op.from.width + kLanes - 1) / kLanes * kLanes;
  }
  const int vectors = (op.from.width + kLanes - 1) / kLanes;
  const int blocks = (vectors + kQueries - 1) / kQueries, work = op.heads * blocks;
  for (int w = work * part / parts; w < work * (part + 1) / parts; ++w) {
    const int head = w / blocks, first = w % blocks * kQueries;
    const int64_t at = static_cast<int64_t>(first) * kLanes;
    attend_of<kQueries>(std::min(kQueries, vectors - first), op,
                        q + head * size * op.from.plane + at,
                        k + head / shared * size * op.to.plane,
                        v + head / shared * size * op.to.plane,
                        out + head * size * op.from.plane + at,
                        mask == nullptr || step == 0 ? mask : mask + at, step,
                        first * kLanes, scores);
  }
}

// y = (x - mean) / sqrt(variance + epsilon) * gamma + beta over the channels of each position.
void norm(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const int64_t plane = op.to.plane;
  const int vectors = static_cast<int>((op.to.width + kLanes - 1) / kLanes);
  for (int j = vectors * part / parts; j < vectors * (part + 1) / parts; ++j) {
    const float* x = arena + where[op.in] + j * kLanes;
    float* y = arena + where[op.out] + j * kLanes;
    Vec mean{}, square{};
    for (int c = 0; c < op.channels; ++c) mean += load(x + c * plane);
    mean *= 1.0f / op.channels;
    for (int c = 0; c < op.channels; ++c) {
      const Vec d = load(x + c * plane) - mean;
      square += d * d;
    }
    Vec inverse = square * (1.0f / op.channels) + op.number;
    for (int i = 0; i < kLanes; ++i) inverse[i] = 1.0f / std::sqrt(inverse[i]);
    for (int c = 0; c < op.channels; ++c) {
      const float gamma = op.scale ? op.scale[c] : 1.0f, beta = op.bias ? op.bias[c] : 0.0f;
      store(y + c * plane, (load(x + c * plane) - mean) * (inverse * gamma) + beta);
    }
  }
}

}  // namespace
}  // namespace sparseworks
