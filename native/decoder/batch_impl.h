// A panel of a matrix times the vectors of many tokens.
#pragma once

#include <algorithm>

#include "widen_avx2_impl.h"
#include "widen_avx512_impl.h"

namespace sparseworks {
namespace {

constexpr int kTokens = 16;  // what a number of tokens is filled up to

// Rows of tokens, filled up with rows that may hold anything.
struct Batch {
  int tokens = 0;  // a multiple of kTokens
  int64_t stride = 0;
  const float* value = nullptr;
  const uint16_t* half = nullptr;  // bf16
};

constexpr int kBlock = 512;  // columns that are widened at once
static_assert(kBlock % kWidest == 0, "whole groups");

// Memory of a thread.
struct Widened {
  alignas(64) float value[kBlock / 2 * kPanel];
  alignas(64) uint16_t half[2][kBlock * kPanel];
};

// out [tokens][16], in fp32.
inline void batch_plainly(const Matrix& m, int panel, const Batch& x, float* out, Widened& wide) {
  constexpr int kColumns = kBlock / 2;
  constexpr int kSide = kRegister == 64 ? 8 : kRegister == 32 ? 4 : 2;  // tokens, sums in registers
  Stream from(m, panel);
  for (int first = 0; first < m.padded(); first += kColumns) {
    const int columns = std::min(kColumns, m.padded() - first);
    for (int c = 0; c < columns; c += m.group) widen_floats(m, from, wide.value + c * kPanel);
    for (int t = 0; t < x.tokens; t += kSide) {
      Vec sum[kSide];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) sum[i] = first ? load(out + (t + i) * kPanel) : Vec{};
      const float* value = x.value + t * x.stride + first;
      for (int c = 0; c < columns; ++c) {
        const Vec w = load(wide.value + c * kPanel);
#pragma GCC unroll 8
        for (int i = 0; i < kSide; ++i) sum[i] += w * value[i * x.stride + c];
      }
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) store(out + (t + i) * kPanel, sum[i]);
    }
  }
}

#if defined(__AVX512BF16__)

constexpr bool kRoundsBatches = true;

// Writes columns [first, first + columns) of a panel, filled up to 32 columns, and moves on.
inline void widen_block(const Matrix& m, Stream& from, int columns, uint16_t* out) {
  for (int c = 0; c < columns; c += m.group) widen(m, from, out + c * kPanel);
  if (columns % 32 != 0) std::memset(out + columns * kPanel, 0, 32 * kPanel);
}

#if defined(__AMX_BF16__)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// Tiles 0 to 3 are sums, 4 and 5 tokens, 6 and 7 panels. What others on this thread had configured
// (llama.cpp does so once and for all) is put back. The compiler takes the instructions to read and
// write but the first bytes of a configuration.
struct Tiles {
  alignas(64) uint8_t before[sizeof(TileConfig)];
  Tiles() {
    _tile_storeconfig(before);
    asm volatile("" : : : "memory");
    _tile_loadconfig(&kTileConfig);
  }
  ~Tiles() {
    asm volatile("" : : : "memory");
    if (before[0] != 0) _tile_loadconfig(before);
    else _tile_release();
  }
};

template <int Tokens, int Panels>
inline void tile_product(const uint16_t* x, int64_t stride, const uint16_t* const* w, int columns,
                         float* const* out, bool start) {
  // the numbers of tiles are part of the instructions
  if (start) {
    _tile_zero(0);
    if (Panels > 1) _tile_zero(1);
    if (Tokens > 1) _tile_zero(2);
    if (Tokens > 1 && Panels > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, out[0], 64);
    if (Panels > 1) _tile_loadd(1, out[1], 64);
    if (Tokens > 1) _tile_loadd(2, out[0] + 16 * kPanel, 64);
    if (Tokens > 1 && Panels > 1) _tile_loadd(3, out[1] + 16 * kPanel, 64);
  }
  for (int c = 0; c < columns; c += 32) {
    _tile_loadd(6, w[0] + c * kPanel, 64);
    _tile_loadd(4, x + c, stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    if (Panels > 1) {
      _tile_loadd(7, w[1] + c * kPanel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (Tokens > 1) {
      _tile_loadd(5, x + 16 * stride + c, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (Panels > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out[0], 64);
  if (Panels > 1) _tile_stored(1, out[1], 64);
  if (Tokens > 1) _tile_stored(2, out[0] + 16 * kPanel, 64);
  if (Tokens > 1 && Panels > 1) _tile_stored(3, out[1] + 16 * kPanel, 64);
}

template <int Panels>
inline void block_product(const Batch& x, int first, int columns, const uint16_t* const* w,
                          float* const* out) {
  for (int t = 0; t < x.tokens; t += 32) {
    float* to[2] = {out[0] + t * kPanel, Panels > 1 ? out[1] + t * kPanel : nullptr};
    const uint16_t* from = x.half + t * x.stride + first;
    if (t + 32 <= x.tokens) tile_product<2, Panels>(from, x.stride, w, columns, to, first == 0);
    else tile_product<1, Panels>(from, x.stride, w, columns, to, first == 0);
  }
}

#else

struct Tiles {
  Tiles() {}
};

template <int Panels>
inline void block_product(const Batch& x, int first, int columns, const uint16_t* const* w,
                          float* const* out) {
  constexpr int kSide = 8;
  for (int t = 0; t < x.tokens; t += kSide) {
    __m512 sum[Panels][kSide];
    for (int p = 0; p < Panels; ++p)
      for (int i = 0; i < kSide; ++i)
        sum[p][i] = first ? _mm512_loadu_ps(out[p] + (t + i) * kPanel) : _mm512_setzero_ps();
    const uint16_t* from = x.half + t * x.stride + first;
    for (int c = 0; c < columns; c += 2) {
      __m512bh weight[Panels];
      for (int p = 0; p < Panels; ++p)
        weight[p] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w[p] + c * kPanel));
      for (int i = 0; i < kSide; ++i) {
        uint32_t pair;
        std::memcpy(&pair, from + i * x.stride + c, sizeof pair);
        const auto value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
        for (int p = 0; p < Panels; ++p) sum[p][i] = _mm512_dpbf16_ps(sum[p][i], weight[p], value);
      }
    }
    for (int p = 0; p < Panels; ++p)
      for (int i = 0; i < kSide; ++i) _mm512_storeu_ps(out[p] + (t + i) * kPanel, sum[p][i]);
  }
}

#endif

// Panels [panel, panel + Panels), each out [tokens][16].
template <int Panels>
inline void rounded_batch(const Matrix& m, int panel, const Batch& x, float* out, Widened& wide) {
  Stream from[2] = {Stream(m, panel), Stream(m, panel + Panels - 1)};
  float* to[Panels];
  for (int p = 0; p < Panels; ++p) {
    to[p] = out + static_cast<int64_t>(p) * x.tokens * kPanel;
  }
  const uint16_t* w[2] = {wide.half[0], wide.half[1]};
  for (int first = 0; first < m.padded(); first += kBlock) {
    const int columns = std::min(kBlock, m.padded() - first);
    for (int p = 0; p < Panels; ++p) widen_block(m, from[p], columns, wide.half[p]);
    block_product<Panels>(x, first, columns, w, to);
  }
}

#else

constexpr bool kRoundsBatches = false;
struct Tiles {
  Tiles() {}
};

#endif

// Whether a batch is read as bf16 (else as floats).
inline bool takes_half(const Matrix& m) { return kRoundsBatches && m.format != Format::kFloat; }

// `panels` is 1 or 2; out [panels][tokens][16].
inline void batch_product(const Matrix& m, int panel, int panels, const Batch& x, float* out,
                          Widened& wide) {
#if defined(__AVX512BF16__)
  if (takes_half(m)) {
    if (panels == 2) rounded_batch<2>(m, panel, x, out, wide);
    else rounded_batch<1>(m, panel, x, out, wide);
    return;
  }
#endif
  for (int p = 0; p < panels; ++p)
    batch_plainly(m, panel + p, x, out + static_cast<int64_t>(p) * x.tokens * kPanel, wide);
}

}  // namespace
}  // namespace sparseworks
