// The Python module. Tensors come in through DLPack; memory is the caller's.
#include <nanobind/stl/string.h>

#include "arrays.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace sparseworks;

void define_program(nb::module_& m);   // program_module.cpp
void define_spmv(nb::module_& m);      // spmv_module.cpp
void define_gathered(nb::module_& m);  // gathered_module.cpp
void define_block(nb::module_& m);     // block_module.cpp
void define_nm(nb::module_& m);        // nm_module.cpp

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of sparseworks.";
  m.def("instruction_set", &instruction_set);
  m.def("has_amx", &has_amx);
  define_program(m);
  define_spmv(m);
  define_gathered(m);
  define_block(m);
  define_nm(m);
  m.def(
      "spmm",
      [](Array<const int64_t, 1> start, Array<const uint16_t, 1> column,
         Array<const float, 1> value, Array<const float, 2> x,
         Bias bias, Array<float, 2> y, int threads) {
        const int64_t rows = count(start) - 1;
        check(rows >= 0 && count(y, 1) == rows && count(x) == count(y) &&
                  count(column) == count(value) && start.data()[rows] == count(value) &&
                  (!bias || count(*bias) == rows) && threads >= 1,
              "spmm");
        const SparseRows w{static_cast<int>(rows), static_cast<int>(count(x, 1)), start.data(),
                           column.data(), value.data()};
        const Spmm kernel = spmm();
        nb::gil_scoped_release release;
        kernel(w, x.data(), count(x), data_or_null(bias), y.data(), threads);
      },
      nb::arg("start"), nb::arg("column"), nb::arg("value"), nb::arg("x"),
      nb::arg("bias").none(), nb::arg("y"), nb::arg("threads"));
}
