// y = W x + b with a sparse W: a bit per column and packed bf16 values, fp32 sums.
#pragma once

#include <cstdint>

namespace sparseworks {

// mask [rows, words], 32 columns a word, lowest bit first. The values of row r are
// value[start[r]] .. value[start[r + 1]]; 32 more follow the last, so that whole vectors are read.
struct MaskedRows {
  int rows;
  int columns;
  int words;
  const int64_t* start;
  const uint32_t* mask;
  const uint16_t* value;
};

using Spmv = void (*)(const MaskedRows& w, const float* x, const float* bias, float* y, int threads);

void spmv_base(const MaskedRows&, const float*, const float*, float*, int);
void spmv_vbmi2(const MaskedRows&, const float*, const float*, float*, int);

}  // namespace sparseworks
