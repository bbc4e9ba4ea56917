// One call of a product of a packed W [rows, columns] with a batch of tokens.
#pragma once

#include <cstdint>

#include "program.h"

namespace sparseworks {

// x [tokens, columns], y and residual [tokens, rows]: fp32, or bf16 where half_in (x) or half_out
// (the other two) says so. bias and residual may be null.
struct Batch {
  const void* x;
  int64_t tokens;
  const float* bias;
  const void* residual;
  void* y;
  bool half_in, half_out;
  Activation activation;
};

}  // namespace sparseworks
