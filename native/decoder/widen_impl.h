// Groups of columns of a panel as floats or bf16, whatever the format.
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

// Writes one group as [group][16] floats and moves on.
inline void widen_plainly(const Matrix& m, Stream& from, float* out) {
  const uint8_t*& at = from.at;
  const int group = m.group;
  const auto place = [&](int column, int row) -> float& { return out[column * kPanel + row]; };
  float scale[kPanel];
  const auto scales = [&] {
    for (int r = 0; r < kPanel; ++r) scale[r] = from_half(word16(at + 2 * r));
    at += 2 * kPanel;
  };
  switch (m.format) {
    case Format::kFloat:
      std::memcpy(out, at, sizeof(float) * kPanel * group);
      at += sizeof(float) * kPanel * group;
      return;
    case Format::kHalf:
      for (int c = 0; c < group; ++c)
        for (int r = 0; r < kPanel; ++r)
          place(c, r) = half_to_float(word16(at + ((c / 2 * kPanel + r) * 2 + c % 2) * 2));
      at += 2 * kPanel * group;
      return;
    case Format::kInt8:
      scales();
      for (int c = 0; c < group; ++c)
        for (int r = 0; r < kPanel; ++r)
          place(c, r) = scale[r] * static_cast<int8_t>(at[(c / 4 * kPanel + r) * 4 + c % 4]);
      at += kPanel * group;
      return;
    case Format::kInt4:
      scales();
      for (int c = 0; c < group; ++c)
        for (int r = 0; r < kPanel; ++r) {
          const uint8_t byte = at[(c / 8 * kPanel + r) * 4 + c % 4];
          place(c, r) = scale[r] * (c % 8 < 4 ? low4(byte) : high4(byte));
        }
      at += kPanel * group / 2;
      return;
    case Format::kMaskedHalf: {
      const uint8_t* mask = at;
      at += 4 * (group / 2);
      for (int c = 0; c < group; c += 2) {
        const uint32_t bits = word32(mask + c / 2 * 4);
        for (int i = 0; i < 32; ++i) {
          const bool kept = bits >> i & 1;
          place(c + i % 2, i / 2) = kept ? half_to_float(word16(at)) : 0.0f;
          at += 2 * kept;
        }
      }
      return;
    }
    case Format::kMaskedInt8: {
      scales();
      const uint8_t* mask = at;
      at += 2 * group;
      for (int c = 0; c < group; c += 4) {
        const uint64_t bits = word64(mask + c / 4 * 8);
        for (int i = 0; i < 64; ++i) {
          const bool kept = bits >> i & 1;
          place(c + i % 4, i / 4) = kept ? scale[i / 4] * static_cast<int8_t>(*at) : 0.0f;
          at += kept;
        }
      }
      return;
    }
    case Format::kMaskedInt4: {
      scales();
      const uint8_t* mask = at;
      at += 2 * group;
      for (int c = 0; c < group; c += 8) {
        int most = 0;
        for (int part = 0; part < 2; ++part) {
          const uint64_t bits = word64(mask + (c / 4 + part) * 8);
          int used = 0;
          for (int i = 0; i < 64; ++i) {
            const bool kept = bits >> i & 1;
            const int code = kept ? (part ? high4(at[used]) : low4(at[used])) : 0;
            place(c + part * 4 + i % 4, i / 4) = scale[i / 4] * code;
            used += kept;
          }
          most = used > most ? used : most;
        }
        at += most;
      }
      return;
    }
    case Format::kGroupInt4: {
      const uint16_t bits = word16(from.rows);
      from.rows += 2;
      const int kept = __builtin_popcount(bits);
      const uint8_t *scale_at = at, *zero_at = at + 2 * kept;
      at += kept * (m.zeros ? 3 : 2);
      for (int r = 0, k = 0; r < kPanel; ++r) {
        const bool here = bits >> r & 1;
        const float s = here ? from_half(word16(scale_at + 2 * k)) : 0.0f;
        const int zero = here && m.zeros ? static_cast<int8_t>(zero_at[k]) : 0;
        for (int c = 0; c < group; ++c) {
          const uint8_t byte = here ? at[(c / 8 * kept + k) * 4 + c % 4] : 0;
          place(c, r) = here ? s * ((c % 8 < 4 ? low4(byte) : high4(byte)) - zero) : 0.0f;
        }
        k += here;
      }
      at += kept * group / 2;
      return;
    }
    case Format::kListedInt8:
      scales();
      std::fill(out, out + group * kPanel, 0.0f);
      for (int c = 0; c < group; c += kListed)
        each_listed(from, [&](int column, int row, int code) {
          place(c + column, row) += scale[row] * code;  // fillings are zeros of column 0
        });
      return;
    case Format::kColumnInt8:
    case Format::kColumnInt4: {
      const bool four = m.format == Format::kColumnInt4, odd = from.panel / 4 % 2 != 0;
      const uint8_t* code = column_at(m, from);
      for (int r = 0; r < kPanel; ++r)
        scale[r] = from_half(word16(at + 2 * (from.panel * kPanel + r)));
      for (int c = 0; c < group; ++c, code += from.column)
        for (int r = 0; r < kPanel; ++r) {
          const int byte = code[r / 4 * 16 + r % 4];
          place(c, r) = scale[r] * (!four ? byte - 128 : (odd ? byte >> 4 : byte & 15) - 8);
        }
      at += from.step;
      return;
    }
  }
}

#if defined(__AVX512VBMI2__)

// Four columns of 64 rows, of which one panel in four is taken: 16 rows of 4 columns.
inline __m512i quads_of(const uint8_t* at, int64_t column, int part) {
  const auto side = [&](const uint8_t* p) {
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + column);
    return part < 2 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
  };
  const __m512i a = side(at), b = side(at + 2 * column);
  return part % 2 == 0 ? _mm512_unpacklo_epi16(a, b) : _mm512_unpackhi_epi16(a, b);
}

// Four columns of 16 rows, scale * code - less with a code a byte in every 32-bit lane, as two rows
// of pairs.
inline void pairs_of(__m512i codes, __m512 scale, uint16_t* out, __m512 less = __m512{}) {
  const __m512i magic = _mm512_set1_epi32(0x3f800000), keep = _mm512_set1_epi32(0xff << 15);
  const __m512i moved = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));  // code + 128
  const __m512 wide = _mm512_mul_ps(scale, _mm512_set1_ps(256.0f));
  const __m512 zero = _mm512_fmadd_ps(scale, _mm512_set1_ps(384.0f), less);  // (1 + 1/2) * 256
  const auto value = [&](__m512i placed) {  // 1 + (code + 128) / 256, scaled
    const __m512 one = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(placed, keep, magic, 0xea));
    return _mm512_castps_si512(_mm512_fmsub_ps(one, wide, zero));
  };
  const __m512i half = _mm512_set1_epi32(0x8000), top = _mm512_set1_epi32(0xffff0000);
  const auto pair = [&](__m512i even, __m512i odd, uint16_t* p) {
    even = _mm512_srli_epi32(_mm512_add_epi32(even, half), 16);
    odd = _mm512_add_epi32(odd, half);
    _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(odd, top, even, 0xea));
  };
  pair(value(_mm512_slli_epi32(moved, 15)), value(_mm512_slli_epi32(moved, 7)), out);
  pair(value(_mm512_srli_epi32(moved, 1)), value(_mm512_srli_epi32(moved, 9)), out + 32);
}

// Bytes that hold 16 times the code, of the low or the high halves.
inline __m512i low_codes(__m512i v) {
  return _mm512_and_si512(_mm512_slli_epi16(v, 4), _mm512_set1_epi8(static_cast<char>(0xf0)));
}
inline __m512i high_codes(__m512i v) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(0xf0)));
}

inline __m512 scales_at(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// What comes before the codes of a group in kGroupInt4, with zeros for the rows without it.
struct KeptGroup {
  __mmask16 rows;
  int count;
  __m512 scale, zero;
  const uint8_t* codes;
  KeptGroup(const Matrix& m, const Stream& from)
      : rows(word16(from.rows)), zero(_mm512_setzero_ps()) {
    count = __builtin_popcount(rows);
    const __m256i s = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.at));
    scale = _mm512_cvtph_ps(_mm256_maskz_expand_epi16(rows, s));
    codes = from.at + 2 * count;
    if (m.zeros) {
      const __m128i z = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
      zero = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_expand_epi8(rows, z)));
      codes += count;
    }
  }
};

// Writes one group as [group / 2][16] pairs of bf16 and moves on.
inline void widen(const Matrix& m, Stream& from, uint16_t* out) {
  const uint8_t*& at = from.at;
  const int group = m.group;
  const __m512 sixteenth = _mm512_set1_ps(1.0f / 16);
  switch (m.format) {
    case Format::kHalf:
      std::memcpy(out, at, 2 * kPanel * group);
      at += 2 * kPanel * group;
      return;
    case Format::kInt8: {
      const __m512 scale = scales_at(at);
      at += 32;
      for (int c = 0; c < group; c += 4, at += 64)
        pairs_of(_mm512_loadu_si512(at), scale, out + c * kPanel);
      return;
    }
    case Format::kInt4: {
      const __m512 scale = _mm512_mul_ps(scales_at(at), sixteenth);
      at += 32;
      for (int c = 0; c < group; c += 8, at += 64) {
        const __m512i v = _mm512_loadu_si512(at);
        pairs_of(low_codes(v), scale, out + c * kPanel);
        pairs_of(high_codes(v), scale, out + (c + 4) * kPanel);
      }
      return;
    }
    case Format::kMaskedHalf: {
      const uint8_t* mask = at;
      at += 2 * group;
      for (int c = 0; c < group; c += 2) {
        const uint32_t bits = word32(mask + 2 * c);
        _mm512_storeu_si512(out + c * kPanel,
                            _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(at)));
        at += 2 * __builtin_popcount(bits);
      }
      return;
    }
    case Format::kMaskedInt8: {
      const __m512 scale = scales_at(at);
      const uint8_t* mask = at + 32;
      at = mask + 2 * group;
      for (int c = 0; c < group; c += 4) {
        const uint64_t bits = word64(mask + 2 * c);
        pairs_of(_mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(at)), scale, out + c * kPanel);
        at += __builtin_popcountll(bits);
      }
      return;
    }
    case Format::kMaskedInt4: {
      const __m512 scale = _mm512_mul_ps(scales_at(at), sixteenth);
      const uint8_t* mask = at + 32;
      at = mask + 2 * group;
      for (int c = 0; c < group; c += 8) {
        const uint64_t a = word64(mask + 2 * c), b = word64(mask + 2 * c + 8);
        const __m512i v = _mm512_loadu_si512(at);
        pairs_of(_mm512_maskz_expand_epi8(a, low_codes(v)), scale, out + c * kPanel);
        pairs_of(_mm512_maskz_expand_epi8(b, high_codes(v)), scale, out + (c + 4) * kPanel);
        const int used = __builtin_popcountll(a), other = __builtin_popcountll(b);
        at += used > other ? used : other;
      }
      return;
    }
    case Format::kGroupInt4: {
      const KeptGroup kept(m, from);
      from.rows += 2;
      const __m512 scale = _mm512_mul_ps(kept.scale, sixteenth);
      const __m512 less = _mm512_mul_ps(kept.scale, kept.zero);
      at = kept.codes;
      for (int c = 0; c < group; c += 8, at += 4 * kept.count) {
        const __m512i v = _mm512_maskz_expand_epi32(kept.rows, _mm512_loadu_si512(at));
        pairs_of(low_codes(v), scale, out + c * kPanel, less);
        pairs_of(high_codes(v), scale, out + (c + 4) * kPanel, less);
      }
      return;
    }
    case Format::kListedInt8: {
      const __m512 scale = scales_at(at);
      at += 32;
      for (int first = 0; first < group; first += kListed) {
        alignas(64) int8_t codes[kListed * kPanel] = {};
        each_listed(from, [&](int column, int row, int code) {
          codes[(column / 4 * kPanel + row) * 4 + column % 4] |= static_cast<int8_t>(code);
        });
        for (int c = 0; c < kListed; c += 4)
          pairs_of(_mm512_load_si512(codes + c * kPanel), scale, out + (first + c) * kPanel);
      }
      return;
    }
    case Format::kColumnInt8:
    case Format::kColumnInt4: {
      const bool four = m.format == Format::kColumnInt4, odd = from.panel / 4 % 2 != 0;
      const int part = from.panel % 4;
      const uint8_t* code = column_at(m, from) - 4 * part;
      const __m512i sign = _mm512_set1_epi8(-128);
      __m512 scale = scales_at(at + 2 * from.panel * kPanel);
      if (four) scale = _mm512_mul_ps(scale, sixteenth);
      for (int c = 0; c < group; c += 4, code += 4 * from.column) {
        const __m512i v = quads_of(code, from.column, part);
        const __m512i codes = !four ? v : odd ? high_codes(v) : low_codes(v);
        pairs_of(_mm512_xor_si512(codes, sign), scale, out + c * kPanel);
      }
      at += from.step;
      return;
    }
    case Format::kFloat:
      break;  // never rounded
  }
}

#endif

}  // namespace
}  // namespace sparseworks
