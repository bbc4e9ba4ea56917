// Where the bytes of a panel are read.
#pragma once

#include "../bf16.h"
#include "half.h"
#include "matrix.h"

namespace sparseworks {
namespace {

inline uint32_t word32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline uint64_t word64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline uint16_t word16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline int low4(uint8_t byte) { return static_cast<int8_t>(byte << 4) >> 4; }
inline int high4(uint8_t byte) { return static_cast<int8_t>(byte) >> 4; }
inline float half_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

// Where a panel is read: its groups, and in kGroupInt4 and kListedInt8 which rows have them. `panel`
// is that of a tile where columns are gathered.
struct Stream {
  const uint8_t* at;
  const uint8_t* rows = nullptr;
  int steps = 0;  // of kListedInt8
  int panel = 0;
  int64_t step = 0, column = 0;  // bytes of a group and of a column of a tile

  Stream(const Matrix& m, int whole) {
    const int panels = m.tile() / kPanel;
    at = m.data + m.offset[m.by_columns() ? whole / panels : whole];
    if (m.by_columns()) {
      panel = whole % panels;
      step = m.group_bytes(whole / panels);
      column = m.column_bytes(whole / panels);
      return;
    }
    if (m.integers()) at += kPanel * sizeof(float);
    if (m.format == Format::kGroupInt4) {
      rows = at;
      at += m.padded() / m.group * 2;
    } else if (m.format == Format::kListedInt8) {
      steps = static_cast<int>(word32(at));
      rows = at + 4;
      at = rows + m.padded() / kListed * steps * 2;
    }
  }
};

// Where the first byte of a panel's column 0 of a group is: 4 rows, and the others 16 bytes on.
inline const uint8_t* column_at(const Matrix& m, const Stream& from) {
  const bool four = m.format == Format::kColumnInt4;
  const int64_t rows = from.column * (four ? 2 : 1), strip = from.panel / 4;
  return from.at + 2 * rows + (four ? strip / 2 : strip) * 64 + from.panel % 4 * 4;
}

// Calls put(column of the group, row, code) for what 64 columns of a panel in kListedInt8 keep, and
// moves on.
template <typename Put>
inline void each_listed(Stream& from, Put&& put) {
  for (int step = 0; step < from.steps; ++step, from.rows += 2) {
    const uint8_t* index = from.at;
    uint32_t rows = word16(from.rows);
    const int fours = 4 * __builtin_popcount(rows);
    for (; rows; rows &= rows - 1, index += 4)
      for (int i = 0; i < 4; ++i)
        put(index[i] & (kListed - 1), __builtin_ctz(rows), static_cast<int8_t>(index[fours + i]));
    from.at += 2 * fours;
  }
}

}  // namespace
}  // namespace sparseworks
