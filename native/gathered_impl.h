// The gathered product, compiled once per instruction set under the name GATHERED_NAME.
//
// Rows are cut into runs, one or more a thread; each run keeps its sums in the first cache while a
// few live columns at a time stream past. A row's sum takes the columns in the order of the index
// whatever the number of threads, so results do not depend on it.
#include <algorithm>

#include "bf16.h"
#include "gathered.h"
#include "pool.h"
#include "scratch.h"

namespace sparseworks {
namespace {

constexpr int kTokens = 4;      // that share one pass over the weights
constexpr int kColumns = 4;     // that share one pass over the sums
constexpr int kLongest = 4096;  // rows of a run: sums of a token stay below half of the first cache

// sum[t][r] += sum over C columns of w[c][r] x[t][c]; `next` are the columns to fetch ahead.
template <int C, int N, typename T>
void add_columns(const T* const* w, const T* const* next, const float* x, float* sum,
                 int64_t length) {
  for (int64_t r = 0; r < length; r += kLanes) {
    Vec column[C];
    for (int c = 0; c < C; ++c) {
      column[c] = load(w[c] + r);
      __builtin_prefetch(next[c] + r);
    }
    for (int t = 0; t < N; ++t) {
      Vec s = load(sum + t * length + r);
      for (int c = 0; c < C; ++c) s += x[t * C + c] * column[c];
      store(sum + t * length + r, s);
    }
  }
}

template <int N, typename T>
void run(const DenseColumns<T>& w, const Gathering& g, int64_t token, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const int64_t length = (end - begin + kLanes - 1) / kLanes * kLanes;
  float* sum = scratch.aligned(N * length);
  std::fill_n(sum, N * length, 0.0f);
  const T* base = w.value + begin;
  const float* x = g.x + token * w.columns;
  float factor[N * kColumns];
  const auto gather = [&](int64_t i, int columns, const T** at) {
    for (int c = 0; c < columns; ++c) {
      at[c] = base + g.index[i + c] * w.pitch;
      for (int t = 0; t < N; ++t) factor[t * columns + c] = x[t * w.columns + g.index[i + c]];
    }
  };
  const T *at[kColumns], *next[kColumns];
  int64_t i = 0;
  for (; i + kColumns <= g.count; i += kColumns) {
    gather(i, kColumns, at);
    for (int c = 0; c < kColumns; ++c)
      next[c] = base + g.index[std::min(i + kColumns + c, g.count - 1)] * w.pitch;
    add_columns<kColumns, N>(at, next, factor, sum, length);
  }
  for (; i < g.count; ++i) {
    gather(i, 1, at);
    add_columns<1, N>(at, at, factor, sum, length);
  }
  for (int t = 0; t < N; ++t) {
    float* y = g.y + (token + t) * w.rows;
    for (int64_t r = begin; r < end; ++r)
      y[r] = sum[t * length + r - begin] + (g.bias != nullptr ? g.bias[r] : 0.0f);
  }
}

template <typename T>
void gathered(const DenseColumns<T>& w, const Gathering& g, int threads) {
  if (w.rows == 0) return;
  const int vectors = (w.rows + kLanes - 1) / kLanes;
  const int least = (w.rows + kLongest - 1) / kLongest;
  const int pieces = std::min(vectors, (least + threads - 1) / threads * threads);
  const auto cut = [&](int64_t p) {
    return std::min<int64_t>(w.rows, vectors * p / pieces * kLanes);
  };
  parallel_for(pieces, threads, [&](int p) {
    int64_t t = 0;
    for (; t + kTokens <= g.tokens; t += kTokens) run<kTokens>(w, g, t, cut(p), cut(p + 1));
    for (; t + 2 <= g.tokens; t += 2) run<2>(w, g, t, cut(p), cut(p + 1));
    if (t < g.tokens) run<1>(w, g, t, cut(p), cut(p + 1));
  });
}

}  // namespace

const Gathered GATHERED_NAME{gathered<float>, gathered<uint16_t>};

}  // namespace sparseworks
