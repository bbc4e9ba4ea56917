// Y = X W^T + b with a sparse W, fp32.
#pragma once

#include <cstdint>

namespace sparseworks {

// W [rows, columns] by rows: the entries of row r are start[r] .. start[r + 1], column indices
// ascending, 16 bits.
struct SparseRows {
  int rows;
  int columns;
  const int64_t* start;
  const uint16_t* column;
  const float* value;
};

// x [tokens, columns] and y [tokens, rows] are contiguous; bias may be null.
using Spmm = void (*)(const SparseRows& w, const float* x, int64_t tokens, const float* bias,
                      float* y, int threads);

void spmm_base(const SparseRows&, const float*, int64_t, const float*, float*, int);
void spmm_avx2(const SparseRows&, const float*, int64_t, const float*, float*, int);
void spmm_avx512(const SparseRows&, const float*, int64_t, const float*, float*, int);

}  // namespace sparseworks
