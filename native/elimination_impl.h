// A lane a row: what the columns before have left over comes in when a column's turn comes, so that
// nothing is written twice. Compiled once per instruction set.
#include <algorithm>

#include "elimination.h"
#include "vec.h"

namespace sparseworks {
namespace {

static_assert(kEliminated == kLanes);

// out [n, 16] of in [16, n].
void to_lanes(const float* in, int64_t n, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) transpose16(in + k, n, out + k * kLanes, kLanes);
  for (; k < n; ++k)
    for (int64_t r = 0; r < kLanes; ++r) out[k * kLanes + r] = in[r * n + k];
}

// out [16, n] of in [n, 16].
void from_lanes(const float* in, int64_t n, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) transpose16(in + k * kLanes, kLanes, out + k, n);
  for (; k < n; ++k)
    for (int64_t r = 0; r < kLanes; ++r) out[r * n + k] = in[k * kLanes + r];
}

// 16 rows or fewer.
Vec eliminate(float* values, const uint8_t* mask, const float* lower, int64_t rows, int64_t n,
              float* scratch) {
  float* w = scratch;                // [n, 16]
  float* kept = w + n * kLanes;      // [n, 16], 1 or 0
  float* error = kept + n * kLanes;  // [n, 16], and what is on its way from and to rows
  std::fill(error + rows * n, error + kLanes * n, 0.0f);
  std::copy(mask, mask + rows * n, error);
  to_lanes(error, n, kept);
  std::copy(values, values + rows * n, error);
  to_lanes(error, n, w);
  Vec squares = all(0.0f);
  for (int64_t k = 0; k < n; ++k) {
    const float* of = lower + k * n;
    Vec sum[4] = {load(w + k * kLanes), all(0.0f), all(0.0f), all(0.0f)};
    int64_t j = 0;
    for (; j + 4 <= k; j += 4)
      for (int i = 0; i < 4; ++i) sum[i] = sum[i] - load(error + (j + i) * kLanes) * of[j + i];
    for (; j < k; ++j) sum[0] = sum[0] - load(error + j * kLanes) * of[j];
    const Vec now = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const Vec stays = now * load(kept + k * kLanes);
    const Vec e = (now - stays) / of[k];
    store(error + k * kLanes, e);
    store(w + k * kLanes, stays);
    squares += e * e;
  }
  from_lanes(w, n, error);
  std::copy(error, error + rows * n, values);
  return squares;
}

}  // namespace

double ELIMINATE_NAME(float* values, const uint8_t* mask, const float* lower, int64_t rows,
                      int64_t n, float* scratch) {
  double total = 0.0;
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t few = rows - row < kLanes ? rows - row : kLanes;
    total += sum_of(eliminate(values + row * n, mask + row * n, lower, few, n, scratch));
  }
  return total;
}

}  // namespace sparseworks
