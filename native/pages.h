// Large pages for memory that is read here and there: fewer misses of the address cache.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparseworks {

constexpr size_t kLargePage = 2 << 20;

// What lies in `bytes` at p is moved into large pages where the system can (Linux 6.1 and later).
inline void to_large_pages(const void* p, size_t bytes) {
#if defined(__linux__)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  const auto begin = (reinterpret_cast<uintptr_t>(p) + kLargePage - 1) / kLargePage * kLargePage;
  const auto end = (reinterpret_cast<uintptr_t>(p) + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#else
  static_cast<void>(p);
  static_cast<void>(bytes);
#endif
}

}  // namespace sparseworks
