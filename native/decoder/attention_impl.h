// Keys and values of the past, and softmax(q k^T) v over them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../math.h"
#include "half.h"
#include "model.h"

namespace sparseworks {
namespace {

inline int padded_size(int size) { return (size + kLanes - 1) / kLanes * kLanes; }

inline Vec load_bytes(const int8_t* p) { return converted<Vec>(loaded<Numbers<int8_t, kLanes>>(p)); }

// One head of one text in one layer.
template <CacheKind K>
struct Past {
  int size;  // filled up
  char* key;
  char* value;
  float* key_scale;
  float* value_scale;

  Past(const Cache& cache, int layer, int heads, int size_of_head, int text, int head)
      : size(padded_size(size_of_head)) {
    const CacheLayer& l = cache.layers[static_cast<size_t>(layer)];
    const int64_t which = static_cast<int64_t>(text) * heads + head;
    constexpr int64_t bytes = K == CacheKind::kFloat ? 4 : K == CacheKind::kHalf ? 2 : 1;
    key = static_cast<char*>(l.key) + which * cache.capacity * size * bytes;
    value = static_cast<char*>(l.value) + which * cache.capacity * size * bytes;
    key_scale = l.key_scale ? l.key_scale + which * cache.capacity : nullptr;
    value_scale = l.value_scale ? l.value_scale + which * cache.capacity : nullptr;
  }

  // 16 numbers, `at` counts numbers.
  Vec read(const char* p, int64_t at) const {
    if constexpr (K == CacheKind::kFloat) return load(reinterpret_cast<const float*>(p) + at);
    else if constexpr (K == CacheKind::kHalf)
      return load_half(reinterpret_cast<const uint16_t*>(p) + at);
    else return load_bytes(reinterpret_cast<const int8_t*>(p) + at);
  }

  // k and v [size], zeros beyond the head's own numbers.
  void write(int position, const float* k, const float* v) const {
    put(key, position / kLanes * static_cast<int64_t>(kLanes) * size + position % kLanes, kLanes, k,
        key_scale, position);
    put(value, static_cast<int64_t>(position) * size, 1, v, value_scale, position);
  }

 private:
  void put(char* to, int64_t at, int step, const float* from, float* scale, int position) const {
    float factor = 1;
    if (K == CacheKind::kInt8) {
      float most = 0;
      for (int i = 0; i < size; ++i) most = std::max(most, from[i] < 0 ? -from[i] : from[i]);
      scale[position] = most / 127;
      factor = most > 0 ? 127 / most : 0;
    }
    for (int i = 0; i < size; i += kLanes) {
      alignas(64) float f[kLanes];
      alignas(64) uint16_t h[kLanes];
      const Vec v = load(from + i) * factor;
      if (K == CacheKind::kHalf) store_half(h, v);
      else store(f, v);
      for (int j = 0; j < kLanes; ++j) {
        const int64_t place = at + static_cast<int64_t>(i + j) * step;
        if (K == CacheKind::kFloat) reinterpret_cast<float*>(to)[place] = f[j];
        else if (K == CacheKind::kHalf) reinterpret_cast<uint16_t*>(to)[place] = h[j];
        else reinterpret_cast<int8_t*>(to)[place] =
            static_cast<int8_t>(f[j] < 0 ? f[j] - 0.5f : f[j] + 0.5f);
      }
    }
  }
};

constexpr int kQueries = 8;  // that read keys and values together
constexpr int kSpan = 128;   // positions at a time
constexpr float kNever = -1e30f;

struct Query {
  const float* value;  // [size], scaled
  float* out;          // [size of a head]
  int first, last;     // sees positions first .. last - 1
};

// Numerators and denominators of softmax over what came before, for up to N queries.
template <CacheKind K, int N>
class Attending {
 public:
  // `memory`: 64-byte aligned, kQueries * (padded size + kSpan) floats
  Attending(const Past<K>& past, const Query* query, int count, float softcap, float* memory)
      : past_(past), query_(query), count_(count), softcap_(softcap), sum_(memory),
        score_(memory + N * past.size) {
    for (int i = 0; i < N; ++i) most_[i] = kNever, total_[i] = 0;
    std::fill(sum_, sum_ + N * past.size, 0.0f);
  }

  void run(int size) {
    int first = query_[0].first, last = query_[0].last;
    for (int i = 1; i < count_; ++i) {
      first = std::min(first, query_[i].first);
      last = std::max(last, query_[i].last);
    }
    for (int at = first / kLanes * kLanes; at < last; at += kSpan) {
      const int end = std::min(at + kSpan, (last + kLanes - 1) / kLanes * kLanes);
      scores(at, end);
      weigh(at, end);
      add(at, std::min(end, last));
    }
    for (int i = 0; i < count_; ++i)
      for (int d = 0; d < size; ++d) query_[i].out[d] = sum_[i * past_.size + d] / total_[i];
  }

 private:
  void scores(int at, int end) {
    for (int block = at; block < end; block += kLanes) {
      Vec s[N] = {};
      const int64_t start = static_cast<int64_t>(block) * past_.size;
      for (int d = 0; d < past_.size; ++d) {
        const Vec k = past_.read(past_.key, start + d * kLanes);
        for (int i = 0; i < N; ++i) s[i] += k * query_[std::min(i, count_ - 1)].value[d];
      }
      for (int i = 0; i < count_; ++i) {
        Vec v = s[i];
        if (past_.key_scale) v *= load(past_.key_scale + block);
        if (softcap_ > 0) v = activate<Activation::kTanh>(v / softcap_) * softcap_;
        const IntVec position = lanes() + block;
        const IntVec seen = (position >= query_[i].first) & (position < query_[i].last);
        store(score_ + i * kSpan + block - at, select(seen, v, all(kNever)));
      }
    }
  }

  void weigh(int at, int end) {
    for (int i = 0; i < count_; ++i) {
      float* s = score_ + i * kSpan;
      Vec most = all(kNever);
      for (int p = 0; p < end - at; p += kLanes) most = maximum(most, load(s + p));
      const float top = std::max(most_[i], largest_of(most));
      keep_[i] = first(exponential(all(most_[i] - top)));
      Vec total{};
      for (int p = 0; p < end - at; p += kLanes) {
        const Vec v = load(s + p);
        Vec e = select(v > kNever * 0.5f, exponential(v - top), Vec{});
        total += e;
        if (past_.value_scale) e *= load(past_.value_scale + at + p);
        store(s + p, e);
      }
      total_[i] = total_[i] * keep_[i] + sum_of(total);
      most_[i] = top;
    }
  }

  void add(int at, int end) {
    for (int d = 0; d < past_.size; d += kLanes) {
      Vec sum[N];
      for (int i = 0; i < N; ++i)
        sum[i] = i < count_ ? load(sum_ + i * past_.size + d) * keep_[i] : Vec{};
      for (int p = at; p < end; ++p) {
        const Vec v = past_.read(past_.value, static_cast<int64_t>(p) * past_.size + d);
        for (int i = 0; i < N; ++i) sum[i] += v * score_[i * kSpan + p - at];
      }
      for (int i = 0; i < count_; ++i) store(sum_ + i * past_.size + d, sum[i]);
    }
  }

  const Past<K>& past_;
  const Query* query_;
  int count_;
  float softcap_;
  float* sum_;
  float* score_;
  float most_[N], total_[N], keep_[N];
};

template <CacheKind K>
inline void attend(const Past<K>& past, const Query* query, int count, float softcap, int size,
                   float* memory) {
  if (count <= 1) Attending<K, 1>(past, query, count, softcap, memory).run(size);
  else if (count <= 2) Attending<K, 2>(past, query, count, softcap, memory).run(size);
  else if (count <= 4) Attending<K, 4>(past, query, count, softcap, memory).run(size);
  else Attending<K, kQueries>(past, query, count, softcap, memory).run(size);
}

// Calls f with the kind as a compile-time constant.
template <typename F>
inline void with_cache(CacheKind kind, F&& f) {
  if (kind == CacheKind::kFloat) f(std::integral_constant<CacheKind, CacheKind::kFloat>{});
  else if (kind == CacheKind::kHalf) f(std::integral_constant<CacheKind, CacheKind::kHalf>{});
  else f(std::integral_constant<CacheKind, CacheKind::kInt8>{});
}

}  // namespace
}  // namespace sparseworks
