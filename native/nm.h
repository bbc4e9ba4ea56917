// Y = activation(X W^T + b + residual) with N kept of every M columns; sums in fp32.
#pragma once

#include <cstdint>

#include "batch.h"

namespace sparseworks {

// W [rows, columns] in strips of 16 rows and groups of `width` columns, filled up with zeros; every
// row keeps `slots` of a group.
//
// half = false: value fp32 [strip][group][slot][16 rows]; position: where in its group a value lies.
//   width 4: one word a slot, row r at bit 2 r.
//   width 8 or 16: two words a slot, row r in word r % 2 at bit 4 (r / 2).
// half = true (width 8 or 16): value bf16 [strip][group][slot][16 rows][2], pairs of kept columns;
//   position: four words a slot, value v in 16-bit word v % 8 at bit 4 (v / 8).
struct GroupedRows {
  int rows;
  int columns;
  int width;
  int slots;
  bool half;
  const void* value;
  const uint32_t* position;
};

using GroupedProduct = void (*)(const GroupedRows& w, const Batch& batch, int threads);

void grouped_base(const GroupedRows&, const Batch&, int);
void grouped_avx2(const GroupedRows&, const Batch&, int);
void grouped_avx512(const GroupedRows&, const Batch&, int);
void grouped_bf16(const GroupedRows&, const Batch&, int);

}  // namespace sparseworks
