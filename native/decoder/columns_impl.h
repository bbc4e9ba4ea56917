// Some groups of a tile of a matrix times one vector, of which only the entries that are not zero
// are read.
#pragma once

#include <algorithm>
#include <vector>

#include "widen_impl.h"
#if defined(__AVX512VBMI2__)
#include "strip_avx512_impl.h"
#elif defined(__AVX2__)
#include "strip_avx2_impl.h"
#endif

namespace sparseworks {
namespace {

inline void tile_plainly(const Matrix& m, int tile, int first, int last, const Input& x,
                         float* out) {
  const bool four = m.format == Format::kColumnInt4;
  const int rows = m.tile_rows(tile);
  const int64_t column = m.column_bytes(tile);
  const uint8_t* at = m.data + m.offset[tile] + first * m.group_bytes(tile);
  std::fill(out, out + rows, 0.0f);
  float part[2][64];
  for (int g = first; g < last; ++g, at += m.group_bytes(tile)) {
    const int begin = x.start[g], end = x.start[g + 1];
    if (begin == end) continue;
    const uint8_t* codes = at + 2 * rows;
    for (int row = 0; row < rows; row += four ? 128 : 64) {
      std::memset(part, 0, sizeof part);
      for (int i = begin; i < end; ++i) {
        if (i > begin && x.column[i] <= x.column[i - 1]) break;  // filled up
        const uint8_t* p = codes + (x.column[i] - g * m.group) * column + (four ? row / 2 : row);
        const float v = x.value[x.column[i]];
        for (int b = 0; b < 64; ++b) {
          part[0][b] += v * static_cast<float>(four ? (p[b] & 15) - 8 : p[b] - 128);
          if (four) part[1][b] += v * static_cast<float>((p[b] >> 4) - 8);
        }
      }
      for (int half = 0; half < (four ? 2 : 1); ++half)
        for (int b = 0; b < 64; ++b) {
          const int r = row + half * 64 + b / 4 % 4 * 16 + b / 16 * 4 + b % 4;
          out[r] += part[half][b] * from_half(word16(at + 2 * r));
        }
    }
  }
}

#if defined(__AVX2__)

// What a product reads, in pieces of one column's size, asked for in this order while the products
// before it are made: the memory sees streams, though products take 64 bytes of many columns in turn.
// Lines go to the second cache.
class Ahead {
 public:
  explicit Ahead(int64_t size) : pieces_(kept()), size_(size) { pieces_.clear(); }

  void put(const uint8_t* at, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += size_) pieces_.push_back(at + b);
  }
  int64_t count() const { return static_cast<int64_t>(pieces_.size()); }
  void ask(int64_t lines) {
    for (; lines > 0 && piece_ < pieces_.size(); --lines) {
      _mm_prefetch(reinterpret_cast<const char*>(pieces_[piece_] + byte_), _MM_HINT_T1);
      byte_ += 64;
      if (byte_ == size_) byte_ = 0, ++piece_;
    }
  }

 private:
  static std::vector<const uint8_t*>& kept() {
    thread_local std::vector<const uint8_t*> memory;
    return memory;
  }
  std::vector<const uint8_t*>& pieces_;
  const int64_t size_;
  size_t piece_ = 0;
  int64_t byte_ = 0;
};

template <bool Four>
inline void tile_codes(const Matrix& m, int tile, int from, int to, const Input& x, float* out) {
  const int rows = m.tile_rows(tile);
  const int64_t column = m.column_bytes(tile), step = m.group_bytes(tile);
  const uint8_t* const base = m.data + m.offset[tile];
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(rows));
  Ahead ahead(column);
  int64_t lead = 0;  // pieces of the first group: there is one group in the cache ahead of its products
  for (int g = from; g < to; ++g) {
    const int begin = x.start[g], end = x.start[g + 1];
    if (begin == end) continue;
    ahead.put(base + g * step, 2 * rows);
    for (int i = begin; i < end; ++i)
      if (i == begin || x.column[i] > x.column[i - 1])  // not filled up
        ahead.put(base + g * step + 2 * rows + (x.column[i] - g * m.group) * column, column);
    if (lead == 0) lead = ahead.count();
  }
  ahead.ask(lead * column / 64);
  for (int g = from; g < to; ++g) {
    const int begin = x.start[g], end = x.start[g + 1];
    if (begin == end) continue;
    const uint8_t* const scales = base + step * g;
    const uint8_t* const codes = scales + 2 * rows;
    const int less = -static_cast<int>(x.sums[g]) * (Four ? 8 : 128);
    for (int64_t b = 0; b < column; b += 64) {
      ahead.ask(Four ? 4 : 2);
      for (int half = 0; half < 64; half += Strip<Four>::kBytes) {
        Strip<Four> strip(less);
        for (int i = begin; i < end; i += 4) {
          const uint8_t* p[4];
          for (int k = 0; k < 4; ++k)
            p[k] = codes + (x.column[i + k] - g * m.group) * column + b + half;
          if (half == 0) ahead.ask(4);
          strip.add(p, static_cast<int>(word32(x.high + i)), static_cast<int>(word32(x.low + i)));
        }
        const int64_t row = (Four ? 2 * b : b) + half / 4;
        strip.finish(scales + 2 * row, out + row);
      }
    }
  }
  const Vec unit = all(x.unit);
  for (int r = 0; r < rows; r += kLanes) store(out + r, load(out + r) * unit);
}

// Groups [first, last); out [rows of the tile].
inline void tile_product(const Matrix& m, int tile, int first, int last, const Input& x,
                         float* out) {
  if (m.format == Format::kColumnInt4) tile_codes<true>(m, tile, first, last, x, out);
  else tile_codes<false>(m, tile, first, last, x, out);
}

#else

inline void tile_product(const Matrix& m, int tile, int first, int last, const Input& x,
                         float* out) {
  tile_plainly(m, tile, first, last, x, out);
}

#endif

}  // namespace
}  // namespace sparseworks
