// A weight matrix as the decoder reads it: panels of 16 rows, each one stream of bytes, the 16 rows
// side by side in the lanes of a vector.
//
// Columns come in groups of `group` (the last one is filled up with zeros). A panel of integers
// begins with 16 floats: for each row, sum of scale * code over its columns. Then follow the groups:
//   kFloat       a column: 16 floats
//   kHalf        two columns: 16 pairs of bf16
//   kInt8        16 fp16 scales; four columns: 16 x 4 codes
//   kInt4        16 fp16 scales; eight columns: 16 x 4 bytes, codes of columns 0-3 in the low
//                halves, of 4-7 in the high ones
//   kMaskedHalf  two columns: 32 bits (row * 2 + column), for all of a group; then the bf16 kept
//   kMaskedInt8  16 fp16 scales; four columns: 64 bits (row * 4 + column), for all of a group;
//                then the codes kept
//   kMaskedInt4  the same with codes of 4 bits: of eight columns, the kept ones of 0-3 in the low
//                halves of the bytes and those of 4-7 in the high ones
//   kGroupInt4   a group is kept or not in each row: 16 bits, for all groups first; then of each
//                group fp16 scales of the kept, their zero points (one byte each, where `zeros`), and
//                for each eight columns the kept rows' four bytes, as in kInt4
//   kListedInt8  int32 steps; 16 bits (a row each) for each 64 columns and step, for all of the panel
//                first; then of each group 16 fp16 scales, and for each 64 columns and step the rows
//                with bits: four columns (6 bits a byte) of each, then their four codes. What a row
//                keeps of 64 columns is filled up with zeros to whole fours
//   kColumnInt8, kColumnInt4  tiles of 4096 or 8192 rows (the last one filled up to a multiple of 128)
//                instead of panels, without the 16 floats; of each group fp16 scales of the rows, then its
//                columns one by one, which are read only where the input is not zero. Codes are moved
//                by 128 or 8. Byte 16 l + 4 k + i of each 64 is row 16 k + 4 l + i; codes of 4 bits of
//                64 rows lie in the low halves, of the next 64 in the high ones
// weight = scale * code, or scale * (code - zero). Codes of 4 bits are two's complement.
// kReadAhead bytes that may be read follow the last panel.
#pragma once

#include <cstdint>

namespace sparseworks {

constexpr int kPanel = 16;
constexpr int kTileBytes = 4096;  // of a column in a tile of kColumnInt8 and kColumnInt4
constexpr int kReadAhead = 64;  // bytes after the last panel

enum class Format : int {
  kFloat, kHalf, kInt8, kInt4, kMaskedHalf, kMaskedInt8, kMaskedInt4, kGroupInt4,
  kColumnInt8, kColumnInt4, kListedInt8,
};
constexpr int kListed = 64;  // columns that an index of kListedInt8 counts

struct Matrix {
  Format format = Format::kFloat;
  int rows = 0;
  int columns = 0;  // of the matrix
  int group = 1;    // columns that share a scale, or that are kept together
  bool zeros = false;
  const uint8_t* data = nullptr;
  const int64_t* offset = nullptr;  // [pieces + 1], in bytes

  int panels() const { return (rows + kPanel - 1) / kPanel; }
  bool by_columns() const {
    return format == Format::kColumnInt8 || format == Format::kColumnInt4;
  }
  // What has an offset of its own: a panel, or a tile.
  int tile() const { return format == Format::kColumnInt4 ? 2 * kTileBytes : kTileBytes; }
  int pieces() const { return by_columns() ? (rows + tile() - 1) / tile() : panels(); }
  int tile_rows(int index) const {
    const int left = rows - index * tile();
    return left >= tile() ? tile() : (left + 127) / 128 * 128;
  }
  int64_t column_bytes(int index) const {
    return tile_rows(index) / (format == Format::kColumnInt4 ? 2 : 1);
  }
  int64_t group_bytes(int index) const {
    return 2 * tile_rows(index) + group * column_bytes(index);
  }
  int padded() const { return (columns + group - 1) / group * group; }
  bool integers() const {
    return format != Format::kFloat && format != Format::kHalf && format != Format::kMaskedHalf;
  }
};

// One vector that matrices are multiplied with. Integers: value = unit * ((high - 128) * 256 +
// (low - 128)); with AVX2 value = unit * q, where each q of 16 bits of an even column is in `high`, of
// an odd one in `low`. Filled up with zeros to a multiple of `kWidest` columns.
//
// Where columns are gathered, high and low are signed and hold only the entries that are not zero,
// those of each group filled up to a multiple of 4: value[column[i]] = unit * (high[i] * 256 +
// low[i]) for start[g] <= i < start[g + 1], and sums[g] is their sum.
constexpr int kWidest = 256;

struct Input {
  const float* value;
  const uint8_t* high;
  const uint8_t* low;
  const float* sums;  // of high * 256 + low, or q, over 16 columns each
  float unit;
  const int32_t* column;
  const int32_t* start;
};

}  // namespace sparseworks
