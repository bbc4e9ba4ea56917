// The tensors of the Python faces: contiguous memory of the caller, through DLPack.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <stdexcept>
#include <string>

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

}  // namespace sparseworks
