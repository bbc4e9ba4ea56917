// The largest scores of every row.
#pragma once

#include <cstdint>

namespace sparseworks {

// Marks with 1 the `keep` largest of a row of n scores, of equal ones the first, and the others with
// 0; -0 is 0. `keys` has room for n integers. Returns whether it could: false where a score is NaN
// or fewer than `keep` are above -infinity.
using KeepLargest = bool (*)(const float* scores, int64_t n, int64_t keep, uint8_t* mask,
                             int32_t* keys);

bool keep_largest_base(const float*, int64_t, int64_t, uint8_t*, int32_t*);
bool keep_largest_avx2(const float*, int64_t, int64_t, uint8_t*, int32_t*);
bool keep_largest_avx512(const float*, int64_t, int64_t, uint8_t*, int32_t*);

}  // namespace sparseworks
