// Between the tensors of a caller and the planes of a program.
#pragma once

#include <algorithm>

#include "product_impl.h"

namespace sparseworks {
namespace {

// out[c][r] = in[r][c]
void transpose(const float* in, int64_t in_stride, int rows, int columns, float* out,
               int64_t out_stride) {
  int r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    int c = 0;
    for (; c + kLanes <= columns; c += kLanes)
      transpose16(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
    for (; c < columns; ++c)
      for (int i = r; i < r + kLanes; ++i) out[c * out_stride + i] = in[i * in_stride + c];
  }
  for (; r < rows; ++r)
    for (int c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
}

// Row y of the pixels of channel c.
template <typename T>
inline T* row_at(T* value, const Op& op, const Geometry& g, int c, int y) {
  const int rows = g.rows(), band = g.bands == 1 ? 0 : y / rows;
  return value + band * op.apart + c * g.plane + g.origin + (y - band * rows) * g.pitch;
}

// The first image of a group of 16; missing ones are read as the last one and never written.
inline int images(const Call& call, int64_t item) {
  return static_cast<int>(std::min<int64_t>(kLanes, call.entries - item * kLanes));
}

// Of the columns of a matrix: the first of an item, and how many there are from there.
inline std::pair<int64_t, int64_t> positions(const Geometry& g, const Tensor& t, int64_t item) {
  const int64_t first = item * g.width;
  return {first, std::min<int64_t>(g.width, t.size - first)};
}

void load_tensor(const Op& op, const int64_t* where, float* arena, const Call& call, int64_t item,
                 int part, int parts) {
  const Geometry& g = op.to;
  const Tensor& t = call.tensors[op.tensor];
  float* out = arena + where[op.out];
  const auto [begin, end] = share(op.channels, part, parts);
  if (op.layout == Layout::kColumns) {
    const auto [first, count] = positions(g, t, item);
    for (int c = begin; c < end; ++c) {
      std::copy_n(t.data + c * t.size + first, count, out + c * g.plane);
      std::fill(out + c * g.plane + count, out + (c + 1) * g.plane, 0.0f);
    }
    return;
  }
  if (op.layout == Layout::kTokens) {
    const float* in = t.data + (t.items == 1 ? 0 : item * t.size);
    for (int c = begin; c < end; c += 64) {
      const int count = std::min(64, end - c);
      transpose(in + c, op.channels, g.width, count, out + c * g.plane, g.plane);
      for (int k = c; k < c + count; ++k)
        std::fill(out + k * g.plane + g.width, out + (k + 1) * g.plane, 0.0f);
    }
    return;
  }
  const auto [first, last] = share(g.bands * op.channels, part, parts);
  for (int i = first; i < last; ++i) {
    float* plane = plane_at(out, op, g, op.channels, i);
    clear_padding(plane, g, true);
    const int c = i % op.channels, above = i / op.channels * g.rows();
    for (int y = 0; y < g.rows(); ++y) {
      const int64_t pixel = (static_cast<int64_t>(c) * g.height + above + y) * g.width;
      float* row = plane + g.origin + y * g.pitch;
      if (g.lanes == 1) {
        std::copy_n(t.data + item * t.size + pixel, g.width, row);
        continue;
      }
      const int count = images(call, item);
      const float* in = t.data + item * kLanes * t.size + pixel;
      if (count == kLanes) {
        transpose(in, t.size, kLanes, g.width, row, kLanes);
        continue;
      }
      for (int x = 0; x < g.width; ++x)
        for (int i = 0; i < kLanes; ++i)
          row[x * kLanes + i] = in[std::min(i, count - 1) * t.size + x];
    }
  }
}

void store_tensor(const Op& op, const int64_t* where, float* arena, const Call& call, int64_t item,
                  int part, int parts) {
  const Geometry& g = op.from;
  const Tensor& t = call.tensors[op.tensor];
  const float* in = arena + where[op.in];
  const auto [begin, end] = share(op.channels, part, parts);
  if (op.layout == Layout::kColumns) {
    const auto [first, count] = positions(g, t, item);
    for (int c = begin; c < end; ++c)
      std::copy_n(in + c * g.plane, count, t.data + c * t.size + first);
    return;
  }
  if (op.layout == Layout::kTokens) {
    float* out = t.data + item * t.size;
    for (int c = begin; c < end; c += 64)  // some lines of a row at a time
      for (int x = 0; x < g.width; x += kLanes)
        transpose(in + c * g.plane + x, g.plane, std::min(64, end - c), std::min(kLanes, g.width - x),
                  out + static_cast<int64_t>(x) * op.channels + c, op.channels);
    return;
  }
  for (int c = begin; c < end; ++c)
    for (int y = 0; y < g.height; ++y) {
      const int64_t pixel = (static_cast<int64_t>(c) * g.height + y) * g.width;
      const float* row = row_at(in, op, g, c, y);
      if (g.lanes == 1) {
        std::copy_n(row, g.width, t.data + item * t.size + pixel);
        continue;
      }
      float* out = t.data + item * kLanes * t.size + pixel;
      for (int i = 0; i < images(call, item); ++i)
        for (int x = 0; x < g.width; ++x) out[i * t.size + x] = row[x * kLanes + i];
    }
}

}  // namespace
}  // namespace sparseworks
