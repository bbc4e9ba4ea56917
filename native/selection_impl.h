// The threshold of a row by bisection over integers in the order of its scores: each step counts how
// many reach the middle, which is one pass over a row that stays in the cache. Compiled once per
// instruction set.
#include <algorithm>
#include <cstring>

#include "selection.h"

namespace sparseworks {
namespace {

constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kMinusInfinity = static_cast<int32_t>(0x807fffff);

int64_t count_from(const int32_t* keys, int64_t n, int32_t least) {
  constexpr int64_t kBlock = 1 << 20;  // whose count fits into 32 bits
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    int32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += keys[i] >= least;
    total += count;
  }
  return total;
}

}  // namespace

bool KEEP_LARGEST_NAME(const float* scores, int64_t n, int64_t keep, uint8_t* mask, int32_t* keys) {
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    const float score = scores[i] + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
    keys[i] = key;
    least = std::min(least, key);
    most = std::max(most, key);
  }
  if (n != 0 && (most > kInfinity || least < kMinusInfinity)) return false;
  if (least == kMinusInfinity && count_from(keys, n, kMinusInfinity + 1) < keep) return false;
  if (keep == 0) {
    std::fill(mask, mask + n, uint8_t{0});  // there may be none, and no memory for them
    return true;
  }
  int64_t low = least, high = static_cast<int64_t>(most) + 1, reaching = n;  // those from `low` on
  while (reaching != keep && high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t count = count_from(keys, n, static_cast<int32_t>(middle));
    if (count >= keep) {
      low = middle;
      reaching = count;
    } else {
      high = middle;
    }
  }
  const auto edge = static_cast<int32_t>(low);
  for (int64_t i = 0; i < n; ++i) mask[i] = keys[i] >= edge;
  for (int64_t i = n; reaching > keep; --reaching) {  // the last of those that are equal
    do --i;
    while (keys[i] != edge);
    mask[i] = 0;
  }
  return true;
}

}  // namespace sparseworks
