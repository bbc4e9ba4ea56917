// The sparse product, compiled once per instruction set under the name SPMM_NAME.
//
// Tokens are taken in tiles of up to 64. A tile of X is transposed into [columns][tile], so that a
// kept weight is one broadcast times a run of tokens; accumulators of two rows stay in registers.
// Results of 16 rows are transposed back and stored as whole lines. Work is cut into (tile, rows)
// pieces with equal numbers of kept weights.
#include <algorithm>
#include <vector>

#include "pool.h"
#include "scratch.h"
#include "spmm.h"
#include "vec.h"

namespace sparseworks {
namespace {

constexpr int kVectors = 4;
constexpr int kTile = kLanes * kVectors;
constexpr int kRows = 16;  // rows whose results are stored together

// tile[c][t] = x[t][c] for `count` tokens; the rest of the tile is zero.
void pack_tile(const float* x, int64_t columns, int count, int width, float* tile) {
  for (int t = 0; t < width; t += kLanes) {
    int64_t c = 0;
    if (t + kLanes <= count)
      for (; c + kLanes <= columns; c += kLanes)
        transpose16(x + t * columns + c, columns, tile + c * width + t, width);
    for (; c < columns; ++c)
      for (int i = 0; i < kLanes; ++i)
        tile[c * width + t + i] = t + i < count ? x[(t + i) * columns + c] : 0.0f;
  }
}

// Two rows at once: V vectors of tokens each.
template <int V>
inline void two_rows(const SparseRows& w, int first, int second, const float* tile, float bias1,
                     float bias2, float* out) {
  Vec a[V], b[V];
  for (int v = 0; v < V; ++v) {
    a[v] = Vec{} + bias1;
    b[v] = Vec{} + bias2;
  }
  int64_t i = w.start[first], j = w.start[second];
  const int64_t i_end = w.start[first + 1], j_end = w.start[second + 1];
  const int64_t both = std::min(i_end - i, j_end - j);
  for (int64_t n = 0; n < both; ++n, ++i, ++j) {
    const Vec* p = reinterpret_cast<const Vec*>(tile + static_cast<int64_t>(w.column[i]) * V * kLanes);
    const Vec* q = reinterpret_cast<const Vec*>(tile + static_cast<int64_t>(w.column[j]) * V * kLanes);
    const float s = w.value[i], t = w.value[j];
    for (int v = 0; v < V; ++v) a[v] += s * p[v];
    for (int v = 0; v < V; ++v) b[v] += t * q[v];
  }
  for (; i < i_end; ++i) {
    const Vec* p = reinterpret_cast<const Vec*>(tile + static_cast<int64_t>(w.column[i]) * V * kLanes);
    for (int v = 0; v < V; ++v) a[v] += w.value[i] * p[v];
  }
  for (; j < j_end; ++j) {
    const Vec* q = reinterpret_cast<const Vec*>(tile + static_cast<int64_t>(w.column[j]) * V * kLanes);
    for (int v = 0; v < V; ++v) b[v] += w.value[j] * q[v];
  }
  Vec* o = reinterpret_cast<Vec*>(out);
  for (int v = 0; v < V; ++v) {
    o[v] = a[v];
    o[V + v] = b[v];
  }
}

// Rows [begin, end) of one tile; V vectors of tokens, of which `count` tokens are real.
template <int V>
void rows_of_tile(const SparseRows& w, int begin, int end, const float* tile, int count,
                  const float* bias, float* y) {
  alignas(64) float block[kRows * V * kLanes];
  for (int r0 = begin; r0 < end; r0 += kRows) {
    const int rows = std::min(kRows, end - r0);
    for (int r = 0; r < rows; r += 2) {
      const int first = r0 + r, second = std::min(first + 1, end - 1);
      alignas(64) float odd[2 * V * kLanes];
      float* out = r + 1 < rows ? block + r * V * kLanes : odd;
      two_rows<V>(w, first, second, tile, bias ? bias[first] : 0.0f, bias ? bias[second] : 0.0f,
                  out);
      if (out == odd) std::memcpy(block + r * V * kLanes, odd, V * kLanes * sizeof(float));
    }
    for (int t = 0; t < count; t += kLanes) {
      if (rows == kRows && t + kLanes <= count) {
        transpose16(block + t, V * kLanes, y + static_cast<int64_t>(t) * w.rows + r0, w.rows);
      } else {
        for (int i = t; i < std::min(count, t + kLanes); ++i)
          for (int r = 0; r < rows; ++r)
            y[static_cast<int64_t>(i) * w.rows + r0 + r] = block[r * V * kLanes + i];
      }
    }
  }
}

// Row boundaries that give each of `parts` pieces about the same number of kept weights.
std::vector<int> balanced(const SparseRows& w, int parts) {
  std::vector<int> cuts{0};
  const int64_t total = w.start[w.rows] + w.rows;
  for (int p = 1; p < parts; ++p) {
    const int64_t goal = total * p / parts;
    int low = cuts.back(), high = w.rows;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (w.start[middle] + middle < goal) low = middle + 1;
      else high = middle;
    }
    cuts.push_back(std::min(w.rows, (low + kRows - 1) / kRows * kRows));
  }
  cuts.push_back(w.rows);
  return cuts;
}

}  // namespace

void SPMM_NAME(const SparseRows& w, const float* x, int64_t tokens, const float* bias, float* y,
               int threads) {
  const int tiles = static_cast<int>((tokens + kTile - 1) / kTile);
  const int pieces = tiles >= threads ? 1 : (threads + tiles - 1) / std::max(1, tiles);
  const std::vector<int> cuts = balanced(w, pieces);
  parallel_for(tiles * pieces, threads, [&](int item) {
    thread_local Scratch scratch;
    const int tile = item / pieces, piece = item % pieces;
    const int64_t t0 = static_cast<int64_t>(tile) * kTile;
    const int count = static_cast<int>(std::min<int64_t>(kTile, tokens - t0));
    const int vectors = (count + kLanes - 1) / kLanes;
    float* packed = scratch.aligned(static_cast<size_t>(w.columns) * vectors * kLanes);
    pack_tile(x + t0 * w.columns, w.columns, count, vectors * kLanes, packed);
    float* out = y + t0 * w.rows;
    const int begin = cuts[piece], end = cuts[piece + 1];
    switch (vectors) {
      case 1: rows_of_tile<1>(w, begin, end, packed, count, bias, out); break;
      case 2: rows_of_tile<2>(w, begin, end, packed, count, bias, out); break;
      case 3: rows_of_tile<3>(w, begin, end, packed, count, bias, out); break;
      default: rows_of_tile<4>(w, begin, end, packed, count, bias, out); break;
    }
  });
}

}  // namespace sparseworks
