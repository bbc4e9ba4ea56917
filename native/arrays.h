// The tensors of the Python faces: contiguous memory of the caller, through DLPack.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "batch.h"

namespace sparseworks {

template <typename T, int N>
using Array =
    nanobind::ndarray<T, nanobind::ndim<N>, nanobind::c_contig, nanobind::device::cpu>;
using Bias = std::optional<Array<const float, 1>>;

template <typename T>
int64_t count(const T& array, int axis = 0) {
  return static_cast<int64_t>(array.shape(axis));
}

inline void check(bool fits, const char* op) {
  if (!fits) throw std::invalid_argument(std::string(op) + ": the shapes do not fit together");
}

inline const float* data_or_null(const Bias& bias) { return bias ? bias->data() : nullptr; }

// fp32, or bf16 seen as 16-bit integers
using Either = nanobind::ndarray<nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

inline bool is_half(const Either& a) {
  if (a.dtype() == nanobind::dtype<uint16_t>()) return true;
  if (a.dtype() == nanobind::dtype<float>()) return false;
  throw std::invalid_argument("tensors are fp32 or 16-bit");
}

// One call on W [rows, columns], checked.
inline Batch make_batch(const char* op, const Either& x, const Bias& bias,
                        const std::optional<Either>& residual, int activation, const Either& y,
                        int threads) {
  const int64_t rows = count(y, 1);
  const bool half = is_half(y);
  check(count(x) == count(y) && threads >= 1 && (!bias || count(*bias) == rows) &&
            activation >= 0 && activation <= static_cast<int>(Activation::kTanh) &&
            (!residual || (count(*residual) == count(y) && count(*residual, 1) == rows &&
                           is_half(*residual) == half)),
        op);
  return {x.data(),
          count(x),
          data_or_null(bias),
          residual ? residual->data() : nullptr,
          y.data(),
          is_half(x),
          half,
          static_cast<Activation>(activation)};
}

}  // namespace sparseworks
