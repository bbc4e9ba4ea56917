// y = W x + b for one vector x, with a sparse W in one of three layouts; sums in fp32.
#pragma once

#include <cstdint>

namespace sparseworks {

// A bit a column and packed bf16 values. mask [rows, words], 32 columns a word, lowest bit first.
// The values of row r are value[start[r]] .. value[start[r + 1]]; 32 more follow the last, so that
// whole vectors are read.
struct MaskedRows {
  int rows;
  int columns;
  int words;
  const int64_t* start;
  const uint32_t* mask;
  const uint16_t* value;
};

// 16-bit column indices and bf16 values; every row is filled up with zeros to a multiple of 16.
struct IndexedRows {
  int rows;
  int columns;
  const int64_t* start;
  const uint16_t* column;
  const uint16_t* value;
};

// A bit a column and packed 8-bit integers, with one scale for 128 columns of a row. mask
// [rows, words], 64 columns a word; scale [rows, words / 2]; 64 more values follow the last.
struct IntegerRows {
  int rows;
  int columns;
  int words;
  const int64_t* start;
  const uint64_t* mask;
  const int8_t* value;
  const float* scale;
};

// bias may be null
struct Spmv {
  void (*masked)(const MaskedRows& w, const float* x, const float* bias, float* y, int threads);
  void (*indexed)(const IndexedRows& w, const float* x, const float* bias, float* y, int threads);
  void (*integer)(const IntegerRows& w, const float* x, const float* bias, float* y, int threads);
};

extern const Spmv spmv_base, spmv_avx2, spmv_vbmi2, spmv_bf16;

}  // namespace sparseworks
