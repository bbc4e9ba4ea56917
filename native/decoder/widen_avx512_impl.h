// Groups of columns of a panel as bf16, whatever the format, with AVX-512.
#pragma once

#include "stream_impl.h"

namespace sparseworks {
namespace {

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
