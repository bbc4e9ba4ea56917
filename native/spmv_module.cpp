// The Python face of the batch-1 products.
#include "arrays.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

void check(bool fits) { sparseworks::check(fits, "spmv"); }

void check(const Array<const int64_t, 1>& start, int64_t values, const Bias& bias,
           const Array<float, 1>& y, int threads) {
  const int64_t rows = count(start) - 1;
  check(rows >= 0 && count(y) == rows && start.data()[rows] == values && threads >= 1 &&
        (!bias || count(*bias) == rows));
}

}  // namespace

void define_spmv(nb::module_& m) {
  m.def(
      "spmv_masked",
      [](Array<const int64_t, 1> start, Array<const uint32_t, 2> mask,
         Array<const uint16_t, 1> value, Array<const float, 1> x, Bias bias, Array<float, 1> y,
         int threads) {
        check(start, count(value) - 32, bias, y, threads);
        check(count(mask) == count(y) && count(mask, 1) == (count(x) + 31) / 32);
        const MaskedRows w{static_cast<int>(count(y)), static_cast<int>(count(x)),
                           static_cast<int>(count(mask, 1)), start.data(), mask.data(),
                           value.data()};
        nb::gil_scoped_release release;
        spmv().masked(w, x.data(), data_or_null(bias), y.data(), threads);
      },
      nb::arg("start"), nb::arg("mask"), nb::arg("value"), nb::arg("x"), nb::arg("bias").none(),
      nb::arg("y"), nb::arg("threads"));
  m.def(
      "spmv_indexed",
      [](Array<const int64_t, 1> start, Array<const uint16_t, 1> column,
         Array<const uint16_t, 1> value, Array<const float, 1> x, Bias bias, Array<float, 1> y,
         int threads) {
        check(start, count(value), bias, y, threads);
        check(count(column) == count(value));
        const IndexedRows w{static_cast<int>(count(y)), static_cast<int>(count(x)), start.data(),
                            column.data(), value.data()};
        nb::gil_scoped_release release;
        spmv().indexed(w, x.data(), data_or_null(bias), y.data(), threads);
      },
      nb::arg("start"), nb::arg("column"), nb::arg("value"), nb::arg("x"), nb::arg("bias").none(),
      nb::arg("y"), nb::arg("threads"));
  m.def(
      "spmv_integer",
      [](Array<const int64_t, 1> start, Array<const uint64_t, 2> mask,
         Array<const int8_t, 1> value, Array<const float, 2> scale, Array<const float, 1> x,
         Bias bias, Array<float, 1> y, int threads) {
        check(start, count(value) - 64, bias, y, threads);
        check(count(mask) == count(y) && count(mask, 1) == (count(x) + 127) / 128 * 2 &&
              count(scale) == count(y) && count(scale, 1) * 2 == count(mask, 1));
        const IntegerRows w{static_cast<int>(count(y)), static_cast<int>(count(x)),
                            static_cast<int>(count(mask, 1)), start.data(), mask.data(),
                            value.data(), scale.data()};
        nb::gil_scoped_release release;
        spmv().integer(w, x.data(), data_or_null(bias), y.data(), threads);
      },
      nb::arg("start"), nb::arg("mask"), nb::arg("value"), nb::arg("scale"), nb::arg("x"),
      nb::arg("bias").none(), nb::arg("y"), nb::arg("threads"));
}
