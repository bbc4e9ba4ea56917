// The Python face of the selection of scores. It takes addresses, which its wrapper answers for.
#include <atomic>
#include <vector>

#include "arrays.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

constexpr int64_t kPiece = 1 << 16;  // scores, below which one thread is as fast

}  // namespace

void define_selection(nb::module_& m) {
  m.def(
      "keep_largest",
      // contiguous fp32 scores [rows, columns] and a mask of a byte each
      [](uintptr_t scores, uintptr_t mask, int64_t rows, int64_t columns, int64_t keep,
         int threads) {
        const KeepLargest call = keep_largest();
        const int64_t step = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, columns));
        std::atomic<bool> could{true};
        nb::gil_scoped_release release;
        parallel_for(static_cast<int>((rows + step - 1) / step), threads, [&](int piece) {
          std::vector<int32_t> keys(columns);
          const int64_t end = std::min(rows, (piece + 1) * step);
          for (int64_t row = piece * step; row < end && could; ++row)
            if (!call(reinterpret_cast<const float*>(scores) + row * columns, columns, keep,
                      reinterpret_cast<uint8_t*>(mask) + row * columns, keys.data()))
              could = false;
        });
        return could.load();
      },
      nb::arg("scores"), nb::arg("mask"), nb::arg("rows"), nb::arg("columns"), nb::arg("keep"),
      nb::arg("threads"));
}
