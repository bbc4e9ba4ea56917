// The Python face of the elimination of columns. It takes addresses, which its wrapper answers for.
#include <vector>

#include "arrays.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

constexpr int64_t kRows = 16 * kEliminated;  // of a thread at a time

}  // namespace

void define_elimination(nb::module_& m) {
  m.def(
      "eliminate",
      // contiguous fp32 values [rows, n] and lower [n, n], a mask of a byte a value
      [](uintptr_t values, uintptr_t mask, uintptr_t lower, int64_t rows, int64_t n, int threads) {
        const Eliminate call = eliminate();
        const auto pieces = static_cast<int>((rows + kRows - 1) / kRows);
        std::vector<double> squares(pieces);
        nb::gil_scoped_release release;
        parallel_for(pieces, threads, [&](int piece) {
          std::vector<float> scratch(3 * n * kEliminated);
          const int64_t row = piece * kRows;
          squares[piece] =
              call(reinterpret_cast<float*>(values) + row * n,
                   reinterpret_cast<const uint8_t*>(mask) + row * n,
                   reinterpret_cast<const float*>(lower), std::min(kRows, rows - row), n,
                   scratch.data());
        });
        double total = 0.0;
        for (const double part : squares) total += part;
        return total;
      },
      nb::arg("values"), nb::arg("mask"), nb::arg("lower"), nb::arg("rows"), nb::arg("n"),
      nb::arg("threads"));
}
