// Y = activation(X W^T + b + residual) with a block-sparse W in bf16; sums in fp32.
#pragma once

#include <cstdint>

#include "batch.h"

namespace sparseworks {

constexpr int kUnit = 16;  // columns of the smallest block

// W [rows, columns] in strips of `height` (16 or 32) rows. The blocks of strip s are
// start[s] .. start[s + 1]; column counts in units of 16. value [block][8][height][2]: the two
// columns of a pair lie beside each other. The last strip and the last unit may reach over the edge;
// there the values are zero.
struct BlockRows {
  int rows;
  int columns;
  int height;
  const int64_t* start;
  const uint16_t* column;
  const uint16_t* value;
};

using BlockProduct = void (*)(const BlockRows& w, const Batch& call, int threads);

void block_base(const BlockRows&, const Batch&, int);
void block_avx2(const BlockRows&, const Batch&, int);
void block_avx512(const BlockRows&, const Batch&, int);
void block_bf16(const BlockRows&, const Batch&, int);

}  // namespace sparseworks
