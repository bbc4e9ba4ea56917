// Groups of columns of a panel as floats, whatever the format.
#pragma once

#include "stream_impl.h"

namespace sparseworks {
namespace {

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

}  // namespace
}  // namespace sparseworks
