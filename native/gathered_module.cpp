// The Python face of the gathered product.
#include "arrays.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

template <typename T>
void define(nb::module_& m, const char* name,
            void (*Gathered::*kernel)(const DenseColumns<T>&, const Gathering&, int)) {
  m.def(
      name,
      [kernel](Array<const T, 2> value, Array<const int64_t, 1> index, Array<const float, 2> x,
               Bias bias, Array<float, 2> y, int threads) {
        const int64_t rows = count(y, 1), columns = count(value), pitch = count(value, 1);
        check(pitch >= rows && pitch % 16 == 0 && count(x, 1) == columns &&
                  count(x) == count(y) && (!bias || count(*bias) == rows) && threads >= 1,
              "gathered");
        for (int64_t i = 0; i < count(index); ++i)
          if (index.data()[i] < 0 || index.data()[i] >= columns)
            throw std::invalid_argument("gathered: index " + std::to_string(index.data()[i]) +
                                        " is not one of " + std::to_string(columns) + " columns");
        const DenseColumns<T> w{static_cast<int>(rows), columns, pitch, value.data()};
        const Gathering g{index.data(), count(index), x.data(),
                          count(x),     data_or_null(bias), y.data()};
        const auto call = gathered().*kernel;
        nb::gil_scoped_release release;
        call(w, g, threads);
      },
      nb::arg("value"), nb::arg("index"), nb::arg("x"), nb::arg("bias").none(), nb::arg("y"),
      nb::arg("threads"));
}

}  // namespace

void define_gathered(nb::module_& m) {
  define<float>(m, "gathered_fp32", &Gathered::single);
  define<uint16_t>(m, "gathered_bf16", &Gathered::half);
}
