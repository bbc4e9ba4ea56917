// Zeros where a mask says so.
#pragma once

#include <cstdint>

namespace sparseworks {

// Clears the elements of `size` bytes (1, 2, 4 or 8) whose byte of the mask is 0; the others are 1.
using KeepOnly = void (*)(const uint8_t* mask, void* values, int size, int64_t begin, int64_t end);

void keep_only_base(const uint8_t*, void*, int, int64_t, int64_t);
void keep_only_avx2(const uint8_t*, void*, int, int64_t, int64_t);
void keep_only_avx512(const uint8_t*, void*, int, int64_t, int64_t);

}  // namespace sparseworks
