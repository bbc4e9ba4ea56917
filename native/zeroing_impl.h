// One pass over the mask and the values; compiled once per instruction set. What is zero already,
// as weights and momentum mostly are after a step whose gradients were masked, is read and not
// written.
#include <algorithm>

#include "zeroing.h"

namespace sparseworks {
namespace {

template <typename T>
void keep(const uint8_t* mask, void* values, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 512;  // elements; fit into the first cache
  T* v = static_cast<T*>(values);
  for (; begin < end; begin += kBlock) {
    const int64_t stop = std::min(end, begin + kBlock);
    T others = 0;
    for (int64_t i = begin; i < stop; ++i) others |= v[i] & static_cast<T>(mask[i] - T{1});
    if (others == 0) continue;
    for (int64_t i = begin; i < stop; ++i) v[i] &= static_cast<T>(-static_cast<T>(mask[i]));
  }
}

}  // namespace

void KEEP_ONLY_NAME(const uint8_t* mask, void* values, int size, int64_t begin, int64_t end) {
  if (size == 1) keep<uint8_t>(mask, values, begin, end);
  if (size == 2) keep<uint16_t>(mask, values, begin, end);
  if (size == 4) keep<uint32_t>(mask, values, begin, end);
  if (size == 8) keep<uint64_t>(mask, values, begin, end);
}

}  // namespace sparseworks
