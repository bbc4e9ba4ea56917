// Memory that a thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sparseworks {
namespace {

struct Scratch {
  std::vector<float> memory;
  // At least `count` floats at a multiple of 64 bytes; what was there may be gone.
  float* aligned(size_t count) {
    if (memory.size() < count + 16) memory.resize(count + 16);
    auto address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
};

}  // namespace
}  // namespace sparseworks
