// The Python module. Tensors come in through DLPack; memory is the caller's.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "dispatch.h"

namespace nb = nanobind;
using namespace sparseworks;

void define_program(nb::module_& m);  // program_module.cpp
void define_spmv(nb::module_& m);     // spmv_module.cpp

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of sparseworks.";
  m.def("instruction_set", &instruction_set);
  define_program(m);
  define_spmv(m);
  m.def(
      "spmm",
      [](Array<const int64_t, 1> start, Array<const uint16_t, 1> column,
         Array<const float, 1> value, Array<const float, 2> x,
         std::optional<Array<const float, 1>> bias, Array<float, 2> y, int threads) {
        const int64_t rows = static_cast<int64_t>(start.shape(0)) - 1;
        if (rows < 0 || static_cast<int64_t>(y.shape(1)) != rows || x.shape(0) != y.shape(0) ||
            column.shape(0) != value.shape(0) ||
            start.data()[rows] != static_cast<int64_t>(value.shape(0)) ||
            (bias && static_cast<int64_t>(bias->shape(0)) != rows) || threads < 1)
          throw std::invalid_argument("spmm: the shapes do not fit together");
        const SparseRows w{static_cast<int>(rows), static_cast<int>(x.shape(1)), start.data(),
                           column.data(), value.data()};
        const Spmm kernel = spmm();
        nb::gil_scoped_release release;
        kernel(w, x.data(), static_cast<int64_t>(x.shape(0)), bias ? bias->data() : nullptr,
               y.data(), threads);
      },
      nb::arg("start"), nb::arg("column"), nb::arg("value"), nb::arg("x"),
      nb::arg("bias").none(), nb::arg("y"), nb::arg("threads"));
}
