// Products of whole values: how they are cut into pieces and blocks, and what lies round the pixels.
#pragma once

#include <limits>
#include <tuple>

#include "rows_impl.h"

namespace sparseworks {
namespace {

// Copies of vectors [first, last) of rows of pixels, moved by one pixel to the right and to the left;
// `first` begins a row. Beyond the ends of a row there is `zero`. Reads no other rows, which another
// thread may be writing.
inline void shift_run(float* p, int64_t shift, int first, int last, int columns, int width,
                      Vec zero = Vec{}) {
  const int inside = width - 1 - (columns - 1) * kLanes;  // of the last vector: with a neighbour
  for (int v = first; v < last; v += columns) {
    Vec left = zero, here = load(p + v * kLanes);
    for (int64_t i = v * kLanes; i < (v + columns) * kLanes; i += kLanes) {
      const bool end = i == (v + columns - 1) * kLanes;
      const Vec after = end ? Vec{} : load(p + i + kLanes);
      const Vec moved = next(here, after);
      store(p + shift + i, previous(left, here));
      store(p + 2 * shift + i, end ? select(lanes() < inside, moved, zero) : moved);
      left = here;
      here = after;
    }
  }
}

// Vectors [first, last) of a run, in blocks of nearly equal size.
template <typename K, typename N, int G, int S>
void run_of(const Taps& w, int begin, int end, const float* in, int first, int last, int64_t at,
            const Target& to) {
  constexpr int most = G == 1 ? kRun : kQuad;
  const int each = std::min(most, to.most), blocks = (last - first + each - 1) / each;
  int shifted = first;
  for (int b = 0, done = first; b < blocks; ++b) {
    const int size = (last - done + blocks - b - 1) / (blocks - b);
    block_of<K, N, G, most, S>(size, w, begin, end, in + static_cast<int64_t>(done) * S * kLanes,
                            at + done * kLanes, done, to);
    done += size;
    if (to.shift == 0) continue;
    const int whole = done / to.columns * to.columns;  // complete rows of pixels
    for (int row = begin * G; row < std::min(end * G, w.rows); ++row)
      shift_run(to.out + row * to.plane + at, to.shift, shifted, whole, to.columns, to.width);
    shifted = whole;
  }
}

// The first group from which on at least `part` of `parts` of all taps lie before.
inline int cut(const Taps& w, int part, int parts) {
  const int groups = (w.rows + w.group - 1) / w.group;
  if (part <= 0) return 0;
  if (part >= parts) return groups;
  const int64_t goal = (w.start[groups] + groups) * part / parts;
  int low = 0, high = groups;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (w.start[middle] + middle < goal) low = middle + 1;
    else high = middle;
  }
  return std::min(groups, (low + w.chunk / 2) / w.chunk * w.chunk);
}

// Plane i of a value with `planes` in each band.
template <typename T>
inline T* plane_at(T* value, const Op& op, const Geometry& g, int planes, int i) {
  return value + i / planes * op.apart + i % planes * g.plane;
}

// Of plane i of words, that hold `size` channels each: the first of their planes in `in`, and how many
// of these channels there are. A channel has `window` planes (its phases).
inline std::pair<const float*, int> channels_of_word(const Op& op, const float* in, int size, int i) {
  const int inner = op.window, count = (op.channels + size - 1) / size * inner;
  const int channel = i % count / inner * size;
  const int64_t plane = static_cast<int64_t>(channel) * inner + i % inner;
  return {in + i / count * op.apart + plane * op.to.plane, std::min(size, op.channels - channel)};
}

// Zeros round rows [first, last) of the pixels of one plane: above its first row and below its last
// one, and between the rows only where they are not written anyway.
inline void clear_padding(float* plane, const Geometry& g, bool between, int first, int last) {
  if (g.pad == 0) return;
  if (first == 0) std::fill(plane, plane + g.origin, 0.0f);
  const int64_t width = static_cast<int64_t>(g.width) * g.lanes;
  if (between)
    for (int y = first; y < last; ++y)
      std::fill(plane + g.origin + y * g.pitch + width, plane + g.origin + (y + 1) * g.pitch, 0.0f);
  if (last == g.rows())
    std::fill(plane + g.origin + (last - 1) * g.pitch + width, plane + g.plane, 0.0f);
}

inline void clear_padding(float* plane, const Geometry& g, bool between) {
  clear_padding(plane, g, between, 0, g.rows());
}

// The shifted copies of all rows of a plane of words, those of the padding as well.
inline void shift_words(float* plane, const Geometry& g, int64_t shift, Vec zero) {
  const int columns = static_cast<int>(g.pitch / kLanes);
  shift_run(plane, shift, 0, static_cast<int>(g.plane / kLanes), columns, g.width, zero);
}

// The shifted copies of a value that was not made by a product.
void shifted(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry& g = op.to;
  const int columns = static_cast<int>(g.pitch / kLanes);
  const auto [begin, end] = share(g.bands * op.channels, part, parts);
  for (int c = begin; c < end; ++c) {
    float* plane = plane_at(arena + where[op.out], op, g, op.channels, c);
    for (int copy = 1; copy < 3; ++copy) clear_padding(plane + copy * op.shift, g, false);
    shift_run(plane + g.origin, op.shift, 0, g.rows() * columns, columns, g.width);
  }
}

// Runs [first_run, last_run) of positions, vectors [first, last) of each, and groups [begin, end).
struct Piece {
  int begin, end, first_run, last_run, first, last;
};

inline int vectors_of(const Op& op) {
  const Geometry& g = op.to;
  const int64_t length =
      op.flat ? (g.rows() - 1) * g.pitch + g.width : static_cast<int64_t>(g.width) * g.lanes;
  return static_cast<int>((length + kLanes - 1) / kLanes);
}

// The padding of what a product makes of channels [begin, end), and of their shifted copies.
inline void clear_round(const Op& op, float* out, int begin, int end, int top, int bottom) {
  for (int c = begin; c < end; ++c)
    for (int copy = 0; copy < (op.shift == 0 ? 1 : 3); ++copy)
      clear_padding(out + copy * op.shift + c * op.to.plane, op.to, !op.flat && op.shift == 0, top,
                    bottom);
}

template <typename T>
struct Kind_of {
  using type = T;
};

// `range`: of the magnitudes of inputs in int8.
void multiply(const Op& op, const Piece& piece, const float* in, const float* residual,
              const float* range, float* out) {
  const Geometry& to = op.to;
  const int columns = op.shift == 0 ? 1 : static_cast<int>(to.pitch / kLanes);
  const bool relu = op.activation == Activation::kRelu;
  // of an image, what the taps of two rows at once read in the first cache; of tokens all, because
  // their many taps are read once for each block
  const int most = to.height > 1 ? kPair : kRun;
  alignas(64) float of_images[kLanes];
  if (op.slots > 0) store(of_images, range_of(range, op.slots, op.from.lanes));
  const Target target{out, residual, op.live.empty() ? nullptr : op.live.data(), op.bias, to.plane,
                      op.shift, columns, to.width, most,
                      relu ? Activation::kNone : op.activation,
                      relu ? 0.0f : -std::numeric_limits<float>::infinity(), op.number,
                      op.taps.zero, op.scale, op.slots > 0 ? of_images : range, op.slots == 0};
  for (int y = piece.first_run; y < piece.last_run; ++y) {
    const float* row = in + y * op.from.pitch * op.stride;
    const int64_t at = to.origin + y * to.pitch;
    const auto run = [&](auto kind) {
      using K = decltype(kind);
      const auto with = [&](auto g, auto stride) {
        const auto over = [&](auto taps) {
          run_of<K, typename decltype(taps)::type, g(), stride()>(
              op.taps, piece.begin, piece.end, row, piece.first, piece.last, at, target);
        };
        if constexpr (stride() == 1)
          if (op.taps.offset == nullptr) return over(Kind_of<Stepped>{});
        over(Kind_of<Listed>{});
      };
      const std::integral_constant<int, 1> one{};
      const std::integral_constant<int, 2> two{};
      const std::integral_constant<int, 4> four{};
      if (op.taps.group == 4) op.stride == 2 ? with(four, two) : with(four, one);
      else op.stride == 2 ? with(one, two) : with(one, one);
    };
    if (op.taps.channels == 4) run(Quad{});
    else if (op.taps.channels == 2) run(Paired{});
    else run(Single{});
  }
}

// The rows of pixels beyond the ends of a band, from the bands above and below, with their copies.
inline void borrow_rows(const Op& op, float* in, int band) {
  const Geometry& g = op.from;
  const int64_t shift = op.planes * g.plane, rows = g.rows() * g.pitch;
  const int columns = static_cast<int>(g.pitch / kLanes);
  const Vec zero = op.taps.channels == 4 ? as<Vec>(Bits{} + kZeros) : Vec{};
  const auto borrow = [&](const float* row, float* to) {
    for (int64_t i = 0; i < g.pitch; i += kLanes) store(to + i, load(row + i));
    if (op.copies > 1) shift_run(to, shift, 0, columns, columns, g.width, zero);
  };
  for (int c = 0; c < op.planes; ++c) {
    float* first = in + c * g.plane + g.origin;
    if (band > 0) borrow(first - op.apart + rows - g.pitch, first - g.pitch);
    if (band + 1 < g.bands) borrow(first + op.apart, first + rows);
  }
}

inline const float* range_at(const Op& op, const int64_t* where, const float* arena) {
  return op.extra < 0 ? nullptr : arena + where[op.extra];
}

void product_of_band(const Op& op, const int64_t* where, float* arena, int band) {
  const Geometry& to = op.to;
  float* own = arena + band * op.apart;
  float *in = own + where[op.in], *out = own + where[op.out];
  if (op.copies > 0) borrow_rows(op, in, band);
  const int top = band == 0 ? 0 : 1, bottom = band + 1 == to.bands ? to.rows() : to.rows() - 1;
  clear_round(op, out, 0, op.channels, top, bottom);
  multiply(op, {0, cut(op.taps, 1, 1), 0, 1, 0, vectors_of(op)}, in + op.from.origin,
           op.other < 0 ? nullptr : own + where[op.other], range_at(op, where, arena), out);
}

// Pieces are bands or runs of positions, or rows of the weight where there are few positions.
void product(const Op& op, const int64_t* where, float* arena, int part, int parts) {
  const Geometry &from = op.from, &to = op.to;
  if (to.bands > 1) {
    const auto [first, last] = share(to.bands, part, parts);
    for (int band = first; band < last; ++band) product_of_band(op, where, arena, band);
    return;
  }
  const int runs = op.flat ? 1 : to.height, vectors = vectors_of(op);
  const int columns = op.shift == 0 ? 1 : static_cast<int>(to.pitch / kLanes);
  const int units = runs > 1 ? runs : (vectors + columns - 1) / columns;
  const bool uneven = 10 * ((units + parts - 1) / parts * parts - units) > units;
  // the last vector of a row of pixels may reach into the next row, which has to come later
  const bool reaches = runs > 1 && from.lanes == 1 && vectors * kLanes > to.pitch;
  const bool few = uneven || reaches || runs * vectors < kWorth * parts;
  Piece piece{few ? cut(op.taps, part, parts) : 0,
              few ? cut(op.taps, part + 1, parts) : cut(op.taps, 1, 1), 0, runs, 0, vectors};
  if (!few && runs > 1) std::tie(piece.first_run, piece.last_run) = share(runs, part, parts);
  if (!few && runs == 1) {
    std::tie(piece.first, piece.last) = share(units, part, parts);
    piece.first *= columns;
    piece.last = std::min(piece.last * columns, vectors);
  }
  float* out = arena + where[op.out];
  // a piece clears round what it makes, so that a thread finds its lines in its own cache
  const int top = runs > 1 ? piece.first_run : piece.first == 0 ? 0 : 1;
  const int bottom = runs > 1 ? piece.last_run : piece.last == vectors ? to.height : 1;
  clear_round(op, out, piece.begin * op.taps.group,
              std::min(piece.end * op.taps.group, op.taps.rows), top, bottom);
  multiply(op, piece, arena + where[op.in] + from.origin,
           op.other < 0 ? nullptr : arena + where[op.other], range_at(op, where, arena), out);
}

}  // namespace
}  // namespace sparseworks
