// The Python face of the block-sparse product.
#include "arrays.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace sparseworks;

void define_block(nb::module_& m) {
  m.def(
      "block",
      [](Array<const int64_t, 1> start, Array<const uint16_t, 1> column,
         Array<const uint16_t, 4> value, Either x, Bias bias, std::optional<Either> residual,
         int activation, Either y, int threads) {
        const int64_t rows = count(y, 1), columns = count(x, 1), height = count(value, 2);
        const int64_t strips = count(start) - 1, units = (columns + kUnit - 1) / kUnit;
        const Batch batch = make_batch("block", x, bias, residual, activation, y, threads);
        check((height == 16 || height == 32) && strips == (rows + height - 1) / height &&
                  count(value, 1) == kUnit / 2 && count(value, 3) == 2 &&
                  count(column) == count(value) && start.data()[0] == 0 &&
                  start.data()[strips] == count(value),
              "block");
        for (int64_t b = 0; b < count(column); ++b) check(column.data()[b] < units, "block");
        const BlockRows w{static_cast<int>(rows),   static_cast<int>(columns),
                          static_cast<int>(height), start.data(),
                          column.data(),            value.data()};
        const BlockProduct product = block_product();
        nb::gil_scoped_release release;
        product(w, batch, threads);
      },
      nb::arg("start"), nb::arg("column"), nb::arg("value"), nb::arg("x"), nb::arg("bias").none(),
      nb::arg("residual").none(), nb::arg("activation"), nb::arg("y"), nb::arg("threads"));
}
