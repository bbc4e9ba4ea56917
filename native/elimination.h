// Columns of a matrix removed from left to right, each compensated by those after it.
#pragma once

#include <cstdint>

namespace sparseworks {

constexpr int kEliminated = 16;  // rows at once

// For each row w of values [rows, n], in place, with upper triangular U: for j = 0 .. n - 1
//   e_j = (w_j - mask_j w_j) / U_jj,   w_k -= e_j U_jk for k > j,   w_j = mask_j w_j.
// `lower` is U^T by rows, `scratch` has room for 3 n kEliminated numbers. Returns the sum of the
// squares of all e_j.
using Eliminate = double (*)(float* values, const uint8_t* mask, const float* lower, int64_t rows,
                             int64_t n, float* scratch);

double eliminate_base(float*, const uint8_t*, const float*, int64_t, int64_t, float*);
double eliminate_avx2(float*, const uint8_t*, const float*, int64_t, int64_t, float*);
double eliminate_avx512(float*, const uint8_t*, const float*, int64_t, int64_t, float*);

}  // namespace sparseworks
