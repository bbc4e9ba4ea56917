// Matrices and models that come from Python, checked before anything reads them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../arrays.h"
#include "../pages.h"
#include "model.h"

namespace sparseworks {

inline void need(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("decoder: ") + what);
}

inline uint64_t bits_at(const uint8_t* p, int bytes) {
  uint64_t v = 0;
  std::memcpy(&v, p, static_cast<size_t>(bytes));
  return v;
}

// What says which rows have the groups of a panel: bytes before the first one and of each. Steps of
// kListedInt8 are those of the panel.
struct Rows {
  int64_t before = 0, group = 0;
  Rows(const Matrix& m, uint64_t steps) {
    if (m.format == Format::kGroupInt4) group = 2;
    if (m.format != Format::kListedInt8) return;
    need(steps <= kListed / 4, "more steps than 64 columns have");
    before = 4;
    group = m.group / kListed * static_cast<int64_t>(steps) * 2;
  }
};

// Bytes of the group that begins at `p`, of which `left` may be read, with the `rows` that have it;
// -1 where it does not fit.
inline int64_t group_bytes(const Matrix& m, const uint8_t* p, int64_t left, const uint8_t* rows,
                    int64_t bytes_of_rows) {
  const int64_t g = m.group;
  int64_t size = 0;
  switch (m.format) {
    case Format::kFloat: size = 64 * g; break;
    case Format::kHalf: size = 32 * g; break;
    case Format::kInt8: size = 32 + 16 * g; break;
    case Format::kInt4: size = 32 + 8 * g; break;
    case Format::kMaskedHalf:
      size = 2 * g;
      if (size > left) return -1;
      for (int c = 0; c < g / 2; ++c) size += 2 * __builtin_popcountll(bits_at(p + 4 * c, 4));
      break;
    case Format::kMaskedInt8:
      size = 32 + 2 * g;
      if (size > left) return -1;
      for (int c = 0; c < g / 4; ++c) size += __builtin_popcountll(bits_at(p + 32 + 8 * c, 8));
      break;
    case Format::kMaskedInt4:
      size = 32 + 2 * g;
      if (size > left) return -1;
      for (int c = 0; c < g / 8; ++c)
        size += std::max(__builtin_popcountll(bits_at(p + 32 + 16 * c, 8)),
                         __builtin_popcountll(bits_at(p + 40 + 16 * c, 8)));
      break;
    case Format::kGroupInt4:
      size = __builtin_popcountll(bits_at(rows, 2)) * ((m.zeros ? 3 : 2) + g / 2);
      break;
    case Format::kListedInt8:
      size = 32;
      for (int64_t i = 0; i < bytes_of_rows; ++i)
        size += 8 * __builtin_popcountll(bits_at(rows + i, 1));
      break;
    case Format::kColumnInt8:
    case Format::kColumnInt4: break;  // of tiles
  }
  return size <= left ? size : -1;
}

inline Matrix make_matrix(int format, int rows, int columns, int group, bool zeros,
                   const Array<const uint8_t, 1>& data, const Array<const int64_t, 1>& offset) {
  need(format >= 0 && format <= static_cast<int>(Format::kListedInt8), "unknown format");
  need(rows > 0 && columns > 0 && group >= 16 && group <= kWidest && kWidest % group == 0 &&
           group % (format == static_cast<int>(Format::kListedInt8) ? kListed : 16) == 0,
       "sizes of a matrix that cannot be");
  Matrix m;
  m.format = static_cast<Format>(format);
  m.rows = rows;
  m.columns = columns;
  m.group = group;
  m.zeros = zeros;
  m.data = data.data();
  m.offset = offset.data();
  need(count(offset) == m.pieces() + 1, "offsets do not fit the rows");
  need(m.offset[0] >= 0 && m.offset[m.pieces()] + kReadAhead <= count(data),
       "the bytes of a matrix end too early");
  for (int p = 0; m.by_columns() && p < m.pieces(); ++p)
    need(m.offset[p] >= 0 && m.offset[p + 1] - m.offset[p] == m.padded() / group * m.group_bytes(p),
         "a tile of a matrix of another size");
  for (int p = 0; !m.by_columns() && p < m.panels(); ++p) {
    int64_t at = m.offset[p] + (m.integers() ? 64 : 0);
    need(m.offset[p] >= 0 && at <= m.offset[p + 1] && m.offset[p + 1] <= m.offset[m.pieces()],
         "a panel of a matrix is longer than its bytes");
    const Rows about(m, bits_at(m.data + at, 4));
    const uint8_t* kept = m.data + at + about.before;
    at += about.before + m.padded() / group * about.group;
    need(at <= m.offset[p + 1], "a panel of a matrix is longer than its bytes");
    for (int c = 0; c < m.padded(); c += group, kept += about.group) {
      const int64_t size =
          at <= m.offset[p + 1]
              ? group_bytes(m, m.data + at, m.offset[p + 1] - at, kept, about.group) : -1;
      need(size >= 0, "a panel of a matrix is longer than its bytes");
      at += size;
    }
    need(at == m.offset[p + 1], "a panel of a matrix is shorter than its bytes");
  }
  if (m.by_columns()) to_large_pages(m.data, static_cast<size_t>(count(data)));
  return m;
}

inline void check_linear(const Linear& l, int rows, int columns) {
  need(l.weight.data && l.weight.rows == rows && l.weight.columns == columns,
       "matrices that do not fit together");
}

inline void check_mlp(const Mlp& m, int width) {
  const int hidden = m.down.weight.columns;
  const int padded = (hidden + kPanel - 1) / kPanel * kPanel;
  check_linear(m.down, width, hidden);
  check_linear(m.up, m.gated ? 2 * padded : hidden, width);
}

inline void check_model(const Model& m) {
  need(m.width > 0 && m.embedding.data && !m.layers.empty(), "a model without layers");
  need(m.head.weight.data && m.head.weight.columns == m.width, "a head of another width");
  for (const Layer& l : m.layers) {
    const Attention& a = l.attention;
    need(a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.size > 0,
         "heads that do not divide");
    check_linear(a.qkv, (a.heads + 2 * a.kv_heads) * a.size, m.width);
    check_linear(a.out, m.width, a.heads * a.size);
    need(a.rotary < static_cast<int>(m.rotary.size()), "no such table of rotations");
    if (a.rotary >= 0) {
      const Rotary& r = m.rotary[static_cast<size_t>(a.rotary)];
      need(r.table && r.dims > 0 && r.dims % 2 == 0 && r.dims <= a.size, "rotations too wide");
    }
    const Mixture& x = l.mixture;
    if (x.chosen == 0) {
      check_mlp(l.mlp, m.width);
      continue;
    }
    need(!x.router.weight.by_columns(), "columns of a router cannot be gathered");
    need(x.count() >= x.chosen, "fewer experts than are chosen");
    check_linear(x.router, x.count() + x.shared, m.width);
    for (const Mlp& e : x.experts) {
      check_mlp(e, m.width);
      need(!e.up.weight.by_columns() && !e.down.weight.by_columns(),
           "columns of experts cannot be gathered");
      need(e.up.weight.format == x.experts[0].up.weight.format &&
               e.up.weight.zeros == x.experts[0].up.weight.zeros,
           "experts in several formats");
    }
  }
}

}  // namespace sparseworks
