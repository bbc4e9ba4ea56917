// Y = X[:, index] W[:, index]^T + b for few live columns of a dense W, stored by columns.
#pragma once

#include <cstdint>

namespace sparseworks {

// Column c of W is at value + c * pitch; pitch is a multiple of 16 and at least `rows`, and what
// lies between is zero. T is float, or uint16_t for bf16.
template <typename T>
struct DenseColumns {
  int rows;
  int64_t columns;
  int64_t pitch;
  const T* value;
};

// The live columns, shared by all tokens of x [tokens, columns]; y [tokens, rows]; bias may be null.
struct Gathering {
  const int64_t* index;
  int64_t count;
  const float* x;
  int64_t tokens;
  const float* bias;
  float* y;
};

struct Gathered {
  void (*single)(const DenseColumns<float>& w, const Gathering& g, int threads);
  void (*half)(const DenseColumns<uint16_t>& w, const Gathering& g, int threads);
};

extern const Gathered gathered_base, gathered_avx2, gathered_avx512;

}  // namespace sparseworks
