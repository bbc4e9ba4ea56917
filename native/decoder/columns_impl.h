// Some groups of a tile of a matrix times one vector, of which only the entries that are not zero
// are read.
#pragma once

#include <algorithm>
#include <vector>

#include "widen_impl.h"

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

#if defined(__AVX512VBMI2__)

// Sums of 64 rows: of codes moved by `kMoved` times the halves of the inputs.
struct TileSums {
  __m512i high[4], low[4];

  explicit TileSums(int less) {
    for (int k = 0; k < 4; ++k) {
      high[k] = _mm512_setzero_si512();
      low[k] = _mm512_set1_epi32(less);
    }
  }
  void add(int k, __m512i codes, __m512i h, __m512i l) {
    high[k] = _mm512_dpbusd_epi32(high[k], codes, h);
    low[k] = _mm512_dpbusd_epi32(low[k], codes, l);
  }
  void finish(const uint8_t* scales, float* out) const {
    for (int k = 0; k < 4; ++k) {
      const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[k], 8), low[k]);
      const __m512 scale = _mm512_cvtph_ps(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 32 * k)));
      _mm512_storeu_ps(out + 16 * k, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale,
                                                     _mm512_loadu_ps(out + 16 * k)));
    }
  }
};

// 64 bytes of four columns as four vectors of 16 rows by 4 columns.
inline void interleave(const uint8_t* const* p, __m512i* quad) {
  const __m512i a = _mm512_loadu_si512(p[0]), b = _mm512_loadu_si512(p[1]);
  const __m512i c = _mm512_loadu_si512(p[2]), d = _mm512_loadu_si512(p[3]);
  const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
  const __m512i ef = _mm512_unpackhi_epi8(a, b), gh = _mm512_unpackhi_epi8(c, d);
  quad[0] = _mm512_unpacklo_epi16(ab, cd);
  quad[1] = _mm512_unpackhi_epi16(ab, cd);
  quad[2] = _mm512_unpacklo_epi16(ef, gh);
  quad[3] = _mm512_unpackhi_epi16(ef, gh);
}

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
  const __m512i nibble = _mm512_set1_epi8(15);
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
      TileSums first(less), second(less);
      const int64_t row = Four ? 2 * b : b;
      ahead.ask(Four ? 4 : 2);
      for (int i = begin; i < end; i += 4) {
        const uint8_t* p[4];
        for (int k = 0; k < 4; ++k) p[k] = codes + (x.column[i + k] - g * m.group) * column + b;
        ahead.ask(4);
        __m512i quad[4];
        interleave(p, quad);
        const __m512i h = _mm512_set1_epi32(static_cast<int>(word32(x.high + i)));
        const __m512i l = _mm512_set1_epi32(static_cast<int>(word32(x.low + i)));
        for (int k = 0; k < 4; ++k) {
          if (!Four) {
            first.add(k, quad[k], h, l);
            continue;
          }
          first.add(k, _mm512_and_si512(quad[k], nibble), h, l);
          second.add(k, _mm512_and_si512(_mm512_srli_epi16(quad[k], 4), nibble), h, l);
        }
      }
      first.finish(scales + 2 * row, out + row);
      if (Four) second.finish(scales + 2 * (row + 64), out + row + 64);
    }
  }
  const __m512 unit = _mm512_set1_ps(x.unit);
  for (int r = 0; r < rows; r += 16)
    _mm512_storeu_ps(out + r, _mm512_mul_ps(_mm512_loadu_ps(out + r), unit));
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
