// The memory of a step, and the products with matrices that it is made of.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "inputs_impl.h"
#include "phases.h"

namespace sparseworks {
namespace {

constexpr int kFew = 8;  // tokens up to which weights are not widened
constexpr int kParts = 64;  // of a tile's columns

// Where pieces of a product begin, as shares of its bytes: large ones first, so that threads meet
// rarely, small ones last, so that they end together.
std::vector<double> shares(int threads) {
  std::vector<double> begin = {0.0};
  while (threads > 1 && 1.0 - begin.back() > 0.02)
    begin.push_back(begin.back() + (1.0 - begin.back()) / (2 * threads));
  begin.push_back(1.0);
  return begin;
}

// Memory of one thread.
struct Thread {
  Widened* wide;
  float* out;
  float* attention;
};

// A piece of the workspace, zero when it is new.
template <typename T>
T* piece(Workspace& space, size_t& next, int64_t count) {
  if (next == space.memory.size()) space.memory.emplace_back();
  std::vector<uint8_t>& m = space.memory[next++];
  const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
  if (m.size() < bytes) m = std::vector<uint8_t>(bytes);
  const auto address = reinterpret_cast<uintptr_t>(m.data());
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

class Products {
 protected:
  using Walk = Phases::Walker;

  Products(const Model& model, const Cache& cache, const Step& step, Workspace& space)
      : m_(model), cache_(cache), s_(step), shares_(shares(step.threads)), few_(step.tokens <= kFew) {
    int columns = m_.width, rows = 1, hidden = 1, queries = 1, heads = 1, experts = 1, used = 1;
    for (const Layer& l : m_.layers) {
      const Attention& a = l.attention;
      rows = std::max(rows, a.qkv.weight.rows);
      queries = std::max(queries, a.heads * padded_size(a.size));
      heads = std::max(heads, a.heads * a.size);
      const auto mlp = [&](const Mlp& p) { hidden = std::max(hidden, p.down.weight.columns); };
      mlp(l.mlp);
      for (const Mlp& p : l.mixture.experts) mlp(p);
      experts = std::max(experts, l.mixture.router.weight.rows);
      used = std::max(used, l.mixture.chosen + l.mixture.shared);
    }
    columns = std::max({columns, heads, hidden});
    hidden_ = hidden;
    used_ = used;
    const int64_t t = step.tokens, many = (t * used + kTokens - 1) / kTokens * kTokens;
    size_t next = 0;
    h_ = piece<float>(space, next, t * m_.width);
    y_ = piece<float>(space, next, t * m_.width);
    qkv_ = piece<float>(space, next, t * rows);
    q_ = piece<float>(space, next, t * queries);
    router_ = piece<float>(space, next, t * experts);
    weight_ = piece<float>(space, next, t * used);
    expert_ = piece<int>(space, next, t * used);
    x_.stride = Vectors::stride_for(columns);
    x_.value = piece<float>(space, next, many * x_.stride);
    x_.half = piece<uint16_t>(space, next, many * x_.stride);
    x_.high = piece<uint8_t>(space, next, many * x_.stride);
    x_.low = piece<uint8_t>(space, next, many * x_.stride);
    x_.sums = piece<float>(space, next, many * x_.stride / 16);
    x_.unit = piece<float>(space, next, many);
    x_.column = piece<int32_t>(space, next, many * x_.stride);
    x_.start = piece<int32_t>(space, next, many * x_.stride);
    partial_ = piece<float>(space, next, partial_sums());
    g_ = piece<float>(space, next, t * used * hidden);
    threads_ = std::vector<Thread>(static_cast<size_t>(step.threads));
    const int64_t out = 2 * kPanel * std::max<int64_t>((t + kTokens - 1) / kTokens * kTokens, 1);
    for (Thread& one : threads_) {
      one.wide = piece<Widened>(space, next, 1);
      one.out = piece<float>(space, next, out);
      one.attention = piece<float>(space, next, kQueries * (queries + kSpan));
    }
  }

  // Numbers that `gathered` needs.
  int64_t partial_sums() const {
    int64_t most = 0;
    const auto see = [&](const Linear& l) {
      const int64_t tiles = l.weight.data && l.weight.by_columns() ? l.weight.pieces() : 0;
      if (tiles) most = std::max(most, kFew * std::max<int64_t>(4 * s_.threads, tiles) * l.weight.tile());
    };
    for (const Layer& l : m_.layers) {
      for (const Linear* one : {&l.attention.qkv, &l.attention.out, &l.mlp.up, &l.mlp.down})
        see(*one);
    }
    see(m_.head);
    return most;
  }

  // out[t][rows of the matrix, or hidden units] for all tokens; an Mlp's `up` with its activation.
  void product(Walk& walk, const Linear& linear, float* out, int width, const Mlp* mlp = nullptr) {
    const Matrix& w = linear.weight;
    const int unit = mlp && mlp->gated ? 2 : 1;
    if (few_ && w.by_columns())
      return gathered(walk, w, s_.tokens, unit, [&](int t, int panel, const Vec* sum) {
        put(linear, mlp, panel, unit, sum[0], sum[1], row(out, t, width), width);
      });
    pieces(walk, w, unit, [&](int panel, int count) {
      if (few_) {
        Vec a[kFew], b[kFew] = {};
        const std::array<Input, kFew> from = inputs(s_.tokens);
        panel_products(w, panel, from.data(), s_.tokens, a);
        if (count == 2) panel_products(w, panel + 1, from.data(), s_.tokens, b);
        for (int t = 0; t < s_.tokens; ++t)
          put(linear, mlp, panel, count, a[t], b[t], row(out, t, width), width);
        return;
      }
      const Batch x = x_.batch(s_.tokens);
      float* sum = mine(walk).out;
      batch_product(w, panel, count, x, sum, *mine(walk).wide);
      for (int t = 0; t < s_.tokens; ++t) {
        const Vec a = load(sum + t * kPanel);
        const Vec b = count == 2 ? load(sum + (x.tokens + t) * kPanel) : Vec{};
        put(linear, mlp, panel, count, a, b, row(out, t, width), width);
      }
    }, few_ ? 1 : 2);
  }

  // Sums of tiles whose columns are read where a token needs them, for `count` tokens; those that
  // several need come from the caches for all but the first. Threads share columns, so that what
  // is read of one lies together; done(token, panel, sum) is called for each panel.
  template <typename Done>
  void gathered(Walk& walk, const Matrix& w, int count, int unit, Done&& done) {
    const int groups = w.padded() / w.group, tiles = w.pieces();
    const int parts = std::clamp(4 * s_.threads / tiles, 1, std::min(groups, kParts));
    const int64_t rows = static_cast<int64_t>(tiles) * w.tile();
    const auto sums = [&](int t, int part) { return partial_ + (t * parts + part) * rows; };
    walk.each(tiles * parts, [&](int i) {
      const int tile = i / parts, part = i % parts;
      for (int t = 0; t < count; ++t)
        tile_product(w, tile, groups * part / parts, groups * (part + 1) / parts, x_.input(t),
                     sums(t, part) + tile * w.tile());
    });
    const int chunk = 16;  // panels
    walk.each((w.panels() + chunk - 1) / chunk, [&](int i) {
      const int last = std::min((i + 1) * chunk, w.panels());
      for (int t = 0; t < count; ++t)
        for (int p = i * chunk; p < last; p += unit) {
          Vec sum[2] = {};
          for (int part = 0; part < parts; ++part)
            for (int k = 0; k < unit; ++k) sum[k] += load(sums(t, part) + (p + k) * kPanel);
          done(t, p, sum);
        }
    });
  }

  // Bias, activation and gate of one or two panels of one token.
  static void put(const Linear& linear, const Mlp* mlp, int panel, int count, Vec a, Vec b,
                  float* out, int width) {
    const float* bias = linear.bias;
    if (bias) a += load(bias + panel * kPanel);
    if (bias && count == 2) b += load(bias + (panel + 1) * kPanel);
    if (mlp) {
      with_activation(mlp->activation, [&](auto kind) {
        a = activate<decltype(kind)::value>(a);
        if (count == 2 && !mlp->gated) b = activate<decltype(kind)::value>(b);
      });
      if (mlp->gated) return write(a * b, out, panel / 2 * kPanel, width);
    }
    write(a, out, panel * kPanel, width);
    if (count == 2) write(b, out, (panel + 1) * kPanel, width);
  }

  static void write(Vec v, float* out, int at, int width) {
    if (at + kPanel <= width) return store(out + at, v);
    float part[kPanel];
    store(part, v);
    std::copy_n(part, std::max(0, width - at), out + at);
  }

  // Calls work(panel, count) for all panels, `unit` at a time where they belong together, else up
  // to `most`.
  template <typename Work>
  void pieces(Walk& walk, const Matrix& w, int unit, Work&& work, int most = 1) {
    const int panels = w.panels(), together = std::max(unit, most);
    const double bytes = static_cast<double>(w.offset[w.pieces()] - w.offset[0]);
    const auto cut = [&](double share) {
      if (w.by_columns()) return static_cast<int>(panels * share) / together * together;
      const auto goal = w.offset[0] + static_cast<int64_t>(bytes * share);
      const auto at = std::lower_bound(w.offset, w.offset + panels, goal) - w.offset;
      return static_cast<int>((at + together - 1) / together * together);
    };
    walk.each(static_cast<int>(shares_.size()) - 1, [&](int i) {
      const bool end = i + 2 == static_cast<int>(shares_.size());
      const int last = end ? panels : std::min(panels, cut(shares_[static_cast<size_t>(i) + 1]));
      for (int p = cut(shares_[static_cast<size_t>(i)]); p < last; p += together)
        work(p, std::min(together, last - p));
    });
  }

  template <typename T>
  static T* row(T* matrix, int64_t at, int64_t width) {
    return matrix + at * width;
  }

  std::array<Input, kFew> inputs(int count) const {
    std::array<Input, kFew> found{};
    for (int i = 0; i < count; ++i) found[static_cast<size_t>(i)] = x_.input(i);
    return found;
  }

  Thread& mine(Walk& walk) { return threads_[static_cast<size_t>(walk.thread())]; }
  float* scratch(Walk& walk) { return mine(walk).attention; }

  const Model& m_;
  const Cache& cache_;
  const Step& s_;
  std::vector<double> shares_;
  bool few_;
  int hidden_, used_;
  float *h_, *y_, *qkv_, *q_, *g_, *router_, *weight_, *partial_;
  int* expert_;
  Vectors x_;
  std::vector<Thread> threads_;
};

}  // namespace
}  // namespace sparseworks
