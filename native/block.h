// Y = activation(X W^T + b + residual) with a block-sparse W in bf16; sums in fp32.
#pragma once

#include <cstdint>

#include "program.h"

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

// x [tokens, columns], y and residual [tokens, rows]: fp32, or bf16 where half_in (x) or half_out
// (the other two) says so. bias and residual may be null.
struct BlockCall {
  const void* x;
  int64_t tokens;
  const float* bias;
  const void* residual;
  void* y;
  bool half_in, half_out;
  Activation activation;
};

using BlockProduct = void (*)(const BlockRows& w, const BlockCall& call, int threads);

void block_base(const BlockRows&, const BlockCall&, int);
void block_avx2(const BlockRows&, const BlockCall&, int);
void block_avx512(const BlockRows&, const BlockCall&, int);
void block_bf16(const BlockRows&, const BlockCall&, int);

}  // namespace sparseworks
