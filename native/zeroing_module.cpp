// The Python face of the zeros of a mask. It takes addresses, which its wrapper answers for: for the
// small tensors of every training step DLPack would cost more than the loop.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

constexpr int64_t kPiece = 1 << 20;  // elements, below which one thread is as fast

}  // namespace

void define_zeroing(nb::module_& m) {
  m.def(
      "keep_only",
      // contiguous memory of n elements each; with every tensor the bytes of an element
      [](uintptr_t mask, const std::vector<std::pair<uintptr_t, int>>& tensors, int64_t n,
         int threads) {
        const KeepOnly call = keep_only();
        const auto pieces = static_cast<int>((n + kPiece - 1) / kPiece);
        nb::gil_scoped_release release;
        parallel_for(pieces, threads, [&](int piece) {
          const int64_t begin = piece * kPiece, end = std::min(n, begin + kPiece);
          for (const auto& [address, size] : tensors)
            call(reinterpret_cast<const uint8_t*>(mask), reinterpret_cast<void*>(address), size,
                 begin, end);
        });
      },
      nb::arg("mask"), nb::arg("tensors"), nb::arg("n"), nb::arg("threads"));
}
