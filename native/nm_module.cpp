// The Python face of the N:M product.
#include "arrays.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

template <typename T>
void define(nb::module_& m, const char* name, bool half) {
  m.def(
      name,
      [half](Array<const T, 1> value, Array<const uint32_t, 1> position, int width, int slots,
             Either x, Bias bias, std::optional<Either> residual, int activation, Either y,
             int threads) {
        const Batch batch = make_batch("nm", x, bias, residual, activation, y, threads);
        const bool four = width == 4 && !half;
        check((four || width == 8 || width == 16) && slots >= 1 && slots <= width, "nm");
        const int64_t strips = (count(y, 1) + 15) / 16, groups = (count(x, 1) + width - 1) / width;
        const int64_t all = strips * groups * slots;
        check(count(value) == all * (half ? 32 : 16) &&
                  count(position) == all * (half ? 4 : four ? 1 : 2),
              "nm");
        const GroupedRows w{static_cast<int>(count(y, 1)), static_cast<int>(count(x, 1)), width,
                            slots, half, value.data(), position.data()};
        const GroupedProduct product = grouped_product();
        nb::gil_scoped_release release;
        product(w, batch, threads);
      },
      nb::arg("value"), nb::arg("position"), nb::arg("width"), nb::arg("slots"), nb::arg("x"),
      nb::arg("bias").none(), nb::arg("residual").none(), nb::arg("activation"), nb::arg("y"),
      nb::arg("threads"));
}

}  // namespace

void define_nm(nb::module_& m) {
  define<float>(m, "nm_fp32", false);
  define<uint16_t>(m, "nm_bf16", true);
}
