// The Python face of the block-sparse product.
#include "arrays.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

// fp32, or bf16 seen as 16-bit integers
using Either = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

bool is_half(const Either& a) {
  if (a.dtype() == nb::dtype<uint16_t>()) return true;
  if (a.dtype() == nb::dtype<float>()) return false;
  throw std::invalid_argument("block: tensors are fp32 or 16-bit");
}

}  // namespace

void define_block(nb::module_& m) {
  m.def(
      "block",
      [](Array<const int64_t, 1> start, Array<const uint16_t, 1> column,
         Array<const uint16_t, 4> value, Either x, Bias bias, std::optional<Either> residual,
         int activation, Either y, int threads) {
        const int64_t rows = count(y, 1), columns = count(x, 1), height = count(value, 2);
        const int64_t strips = count(start) - 1, units = (columns + kUnit - 1) / kUnit;
        const bool half = is_half(y);
        check((height == 16 || height == 32) && strips == (rows + height - 1) / height &&
                  count(value, 1) == kUnit / 2 && count(value, 3) == 2 &&
                  count(column) == count(value) && start.data()[0] == 0 &&
                  start.data()[strips] == count(value) && count(x) == count(y) && threads >= 1 &&
                  (!bias || count(*bias) == rows) && activation >= 0 &&
                  activation <= static_cast<int>(Activation::kTanh) &&
                  (!residual || (count(*residual) == count(y) && count(*residual, 1) == rows &&
                                 is_half(*residual) == half)),
              "block");
        for (int64_t b = 0; b < count(column); ++b) check(column.data()[b] < units, "block");
        const BlockRows w{static_cast<int>(rows),   static_cast<int>(columns),
                          static_cast<int>(height), start.data(),
                          column.data(),            value.data()};
        const BlockCall call{x.data(),
                             count(x),
                             data_or_null(bias),
                             residual ? residual->data() : nullptr,
                             y.data(),
                             is_half(x),
                             half,
                             static_cast<Activation>(activation)};
        const BlockProduct product = block_product();
        nb::gil_scoped_release release;
        product(w, call, threads);
      },
      nb::arg("start"), nb::arg("column"), nb::arg("value"), nb::arg("x"), nb::arg("bias").none(),
      nb::arg("residual").none(), nb::arg("activation"), nb::arg("y"), nb::arg("threads"));
}
