// One step of a decoder, compiled once per instruction set under the name DECODER.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention_impl.h"
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

class Run {
  using Walk = Phases::Walker;

 public:
  Run(const Model& model, const Cache& cache, const Step& step, Workspace& space)
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

  void run() {
    Phases phases(5 + 18 * static_cast<int>(m_.layers.size()));
    phases.run(s_.threads, [&](Walk& walk) {
      if (few_) return go(walk);
      [[maybe_unused]] const Tiles tiles;
      go(walk);
    });
  }

  // The head alone, of given vectors.
  void run_head(const float* x) {
    Phases phases(3);
    phases.run(s_.threads, [&](Walk& walk) {
      const auto go = [&] {
        head(walk, [&](int i) { return x + static_cast<int64_t>(i) * m_.width; });
      };
      if (few_) return go();
      [[maybe_unused]] const Tiles tiles;
      go();
    });
  }

 private:
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

  void go(Walk& walk) {
    embed(walk);
    for (size_t i = 0; i < m_.layers.size(); ++i) layer(walk, static_cast<int>(i));
    finish(walk);
  }

  void embed(Walk& walk) {
    walk.each(s_.tokens, [&](int t) {
      float* h = row(h_, t, m_.width);
      read(m_.embedding, s_.token[t], h, false);
      for (int i = 0; i < m_.width; ++i) h[i] *= m_.embedding_scale;
      if (m_.positions.data) read(m_.positions, s_.position[t] + m_.position_offset, h, true);
      normalize(m_.embedding_norm, h, h, m_.width);
      std::fill(row(y_, t, m_.width), row(y_, t, m_.width) + m_.width, 0.0f);
    });
  }

  void read(const Table& table, int at, float* to, bool add) const {
    const int64_t start = static_cast<int64_t>(at) * m_.width;
    for (int i = 0; i < m_.width; ++i) {
      float v;
      if (table.kind == 0) v = static_cast<const float*>(table.data)[start + i];
      else if (table.kind == 1) v = half_to_float(static_cast<const uint16_t*>(table.data)[start + i]);
      else v = from_half(static_cast<const uint16_t*>(table.data)[start + i]);
      to[i] = add ? to[i] + v : v;
    }
  }

  void layer(Walk& walk, int index) {
    const Layer& l = m_.layers[static_cast<size_t>(index)];
    const Layer* before = index > 0 ? &m_.layers[static_cast<size_t>(index - 1)] : nullptr;
    walk.each(s_.tokens, [&](int t) {
      if (before) collect(before->after_mlp, before->residual, t);
      ready(l.before_attention, l.attention.qkv, t);
    });
    product(walk, l.attention.qkv, qkv_, l.attention.qkv.weight.rows);
    attention(walk, l.attention, index);
    walk.each(s_.tokens, [&](int t) { make_ready(l.attention.out, x_, t, !few_); });
    product(walk, l.attention.out, y_, m_.width);
    const bool mixed = l.mixture.chosen > 0;
    const Linear& first = mixed ? l.mixture.router : l.mlp.up;
    walk.each(s_.tokens, [&](int t) {
      if (!l.parallel) collect(l.after_attention, l.residual, t);
      ready(l.before_mlp, first, t);
      if (l.parallel) collect(l.after_attention, l.residual, t);
    });
    if (mixed) return mixture(walk, l);
    product(walk, l.mlp.up, g_, l.mlp.down.weight.columns, &l.mlp);
    walk.each(s_.tokens, [&](int t) {
      std::copy(row(g_, t, l.mlp.down.weight.columns), row(g_, t + 1, l.mlp.down.weight.columns),
                row(x_.value, t, x_.stride));
      make_ready(l.mlp.down, x_, t, !few_);
    });
    product(walk, l.mlp.down, y_, m_.width);
  }

  // h += residual * norm(y)
  void collect(const Norm& norm, float residual, int t) {
    float *h = row(h_, t, m_.width), *y = row(y_, t, m_.width);
    normalize(norm, y, y, m_.width);
    for (int i = 0; i < m_.width; ++i) h[i] += residual * y[i];
  }

  // norm(h) for a product with `linear`.
  void ready(const Norm& norm, const Linear& linear, int t) {
    normalize(norm, row(h_, t, m_.width), row(x_.value, t, x_.stride), m_.width);
    make_ready(linear, x_, t, !few_);
  }

  void attention(Walk& walk, const Attention& a, int index) {
    const int size = padded_size(a.size), share = a.heads / a.kv_heads;
    walk.each(s_.tokens * a.kv_heads, [&](int i) {
      turn(walk, a, index, i / a.kv_heads, i % a.kv_heads, size, share);
    });
    // queries that share keys, in blocks; the tokens of a text follow each other
    const int block = std::max(1, std::min(kQueries, share * s_.tokens * a.kv_heads / s_.threads));
    const int per_head = (s_.tokens * share + block - 1) / block;
    walk.each(per_head * a.kv_heads, [&](int i) {
      const int kv = i / per_head, begin = i % per_head * block;
      const int end = std::min(begin + block, s_.tokens * share);
      Query query[kQueries];
      for (int at = begin; at < end;) {
        const int text = s_.text[at / share];
        int count = 0;
        for (; at < end && s_.text[at / share] == text; ++at, ++count) {
          const int t = at / share, head = kv * share + at % share;
          const int last = s_.position[t] + 1;
          query[count] = {row(q_, t, a.heads * size) + head * size,
                          row(x_.value, t, x_.stride) + head * a.size,
                          a.window > 0 ? std::max(0, last - a.window) : 0, last};
        }
        with_cache(cache_.kind, [&](auto kind) {
          const Past<decltype(kind)::value> past(cache_, index, a.kv_heads, a.size, text, kv);
          attend(past, query, count, a.softcap, a.size, scratch(walk));
        });
      }
    });
  }

  // Queries, keys and values of one token and one head of keys, turned to their position.
  void turn(Walk& walk, const Attention& a, int index, int t, int kv, int size, int share) {
    const float* from = row(qkv_, t, a.qkv.weight.rows);
    const auto head = [&](const float* x, const Norm& norm, float* to) {
      normalize(norm, x, to, a.size);
      if (a.rotary >= 0) rotate(m_.rotary[static_cast<size_t>(a.rotary)], s_.position[t], to);
      std::fill(to + a.size, to + size, 0.0f);
    };
    for (int i = kv * share; i < (kv + 1) * share; ++i) {
      float* to = row(q_, t, a.heads * size) + i * size;
      head(from + i * a.size, a.query_norm, to);
      for (int d = 0; d < a.size; ++d) to[d] *= a.scale;
    }
    float *k = scratch(walk), *v = k + size;
    head(from + (a.heads + kv) * a.size, a.key_norm, k);
    const float* value = from + (a.heads + a.kv_heads + kv) * a.size;
    std::copy(value, value + a.size, v);
    std::fill(v + a.size, v + size, 0.0f);
    with_cache(cache_.kind, [&](auto kind) {
      Past<decltype(kind)::value>(cache_, index, a.kv_heads, a.size, s_.text[t], kv)
          .write(s_.position[t], k, v);
    });
  }

  static void rotate(const Rotary& r, int position, float* x) {
    const int half = r.dims / 2;
    const float* cosine = r.table + static_cast<int64_t>(position) * r.dims;
    const float* sine = cosine + half;
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cosine[i] - b * sine[i];
      x[i + half] = b * cosine[i] + a * sine[i];
    }
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

  void mixture(Walk& walk, const Layer& l) {
    const Mixture& x = l.mixture;
    const int experts = x.count(), each = x.chosen + x.shared;
    product(walk, x.router, router_, x.router.weight.rows);
    walk.each(s_.tokens, [&](int t) { choose(x, t, experts, each); });
    const Linear& first = x.experts[0].up;
    walk.each(s_.tokens, [&](int t) { make_ready(first, x_, t, false); });
    const int cuts = static_cast<int>(shares_.size()) - 1;
    const auto parts = [&](int units, int i, auto&& work) {
      const auto cut = [&](int k) { return static_cast<int>(units * shares_[static_cast<size_t>(k)]); };
      for (int u = cut(i); u < cut(i + 1); ++u) work(u);
    };
    const int count = static_cast<int>(x.experts.size());
    walk.each(count * cuts, [&](int i) {
      const Mlp& mlp = x.experts[static_cast<size_t>(i / cuts)];
      const Matrix& w = mlp.up.weight;
      const int unit = mlp.gated ? 2 : 1;
      if (!any(i / cuts, each)) return;
      parts(w.panels() / unit, i % cuts, [&](int u) {
        for (int pair = 0; pair < s_.tokens * each; ++pair) {
          if (expert_[pair] != i / cuts) continue;
          const Input in = x_.input(pair / each);
          const Vec a = panel_product(w, u * unit, in);
          const Vec b = unit == 2 ? panel_product(w, u * 2 + 1, in) : Vec{};
          put(mlp.up, &mlp, u * unit, unit, a, b, row(g_, pair, hidden_), mlp.down.weight.columns);
        }
      });
    });
    walk.each(s_.tokens * each, [&](int pair) {
      const Mlp& mlp = x.experts[static_cast<size_t>(expert_[pair])];
      const int columns = mlp.down.weight.columns;
      std::copy(row(g_, pair, hidden_), row(g_, pair, hidden_) + columns, row(x_.value, pair, x_.stride));
      make_ready(mlp.down, x_, pair, false);
    });
    walk.each(cuts, [&](int i) {
      parts((m_.width + kPanel - 1) / kPanel, i, [&](int panel) {
        for (int t = 0; t < s_.tokens; ++t) {
          Vec sum{};
          for (int e = 0; e < each; ++e) {
            const int pair = t * each + e;
            const Linear& down = x.experts[static_cast<size_t>(expert_[pair])].down;
            Vec y = panel_product(down.weight, panel, x_.input(pair));
            if (down.bias) y += load(down.bias + panel * kPanel);
            sum += y * weight_[pair];
          }
          write(sum, row(y_, t, m_.width), panel * kPanel, m_.width);
        }
      });
    });
  }

  bool any(int expert, int each) const {
    return std::find(expert_, expert_ + s_.tokens * each, expert) != expert_ + s_.tokens * each;
  }

  // Softmax over all experts, then the largest.
  void choose(const Mixture& x, int t, int experts, int each) {
    float* logit = row(router_, t, x.router.weight.rows);
    const float gate = x.shared ? 1.0f / (1.0f + std::exp(-logit[experts])) : 0.0f;
    const float most = *std::max_element(logit, logit + experts);
    float total = 0;
    for (int e = 0; e < experts; ++e) total += logit[e] = std::exp(logit[e] - most);
    float kept = 0;
    for (int k = 0; k < x.chosen; ++k) {
      const int best = static_cast<int>(std::max_element(logit, logit + experts) - logit);
      expert_[t * each + k] = best;
      weight_[t * each + k] = logit[best] / total;
      kept += logit[best] / total;
      logit[best] = -1;
    }
    for (int k = 0; x.normalized && k < x.chosen; ++k) weight_[t * each + k] /= kept;
    if (x.shared) {
      expert_[t * each + x.chosen] = experts;
      weight_[t * each + x.chosen] = gate;
    }
  }

  void finish(Walk& walk) {
    walk.each(s_.tokens, [&](int t) {
      const Layer& last = m_.layers.back();
      collect(last.after_mlp, last.residual, t);
    });
    head(walk, [&](int i) { return row(h_, s_.want[i], m_.width); });
  }

  template <typename Hidden>
  void head(Walk& walk, Hidden&& hidden) {
    const bool few = s_.wanted <= kFew;
    const Matrix& w = m_.head.weight;
    const auto put_logits = [&](Vec v, int i, int panel) {
      if (m_.head.bias) v += load(m_.head.bias + panel * kPanel);
      v *= m_.logit_scale;
      if (m_.logit_softcap > 0)
        v = activate<Activation::kTanh>(v / m_.logit_softcap) * m_.logit_softcap;
      write(v, row(s_.logits, i, w.rows), panel * kPanel, w.rows);
    };
    walk.each(s_.wanted, [&](int i) {
      normalize(m_.final_norm, hidden(i), row(x_.value, i, x_.stride), m_.width);
      make_ready(m_.head, x_, i, !few);
    });
    if (few && w.by_columns())
      return gathered(walk, w, s_.wanted, 1, [&](int i, int panel, const Vec* sum) {
        put_logits(sum[0], i, panel);
      });
    pieces(walk, w, 1, [&](int panel, int count) {
      float* sum = mine(walk).out;
      const Batch x = x_.batch(s_.wanted);
      if (few) {
        for (int p = 0; p < count; ++p) {
          Vec found[kFew];
          const std::array<Input, kFew> from = inputs(s_.wanted);
          panel_products(w, panel + p, from.data(), s_.wanted, found);
          for (int i = 0; i < s_.wanted; ++i) store(sum + (p * x.tokens + i) * kPanel, found[i]);
        }
      } else {
        batch_product(w, panel, count, x, sum, *mine(walk).wide);
      }
      for (int p = 0; p < count; ++p)
        for (int i = 0; i < s_.wanted; ++i)
          put_logits(load(sum + (p * x.tokens + i) * kPanel), i, panel + p);
    }, few ? 1 : 2);
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

void run_step(const Model& model, const Cache& cache, const Step& step, Workspace& space) {
  Run(model, cache, step, space).run();
}

void run_product(const Matrix& w, const float* x, int tokens, float* y, int threads) {
  // a model of nothing but a head
  Model model;
  model.width = w.columns;
  model.head.weight = w;
  Step step;
  step.tokens = step.wanted = tokens;
  step.logits = y;
  step.threads = threads;
  thread_local Workspace space;
  Run(model, {}, step, space).run_head(x);
}

double run_time(const Matrix& w, int repeats) {
  Workspace space;
  size_t next = 0;
  Vectors x;
  x.stride = Vectors::stride_for(w.columns);
  x.value = piece<float>(space, next, x.stride);
  x.high = piece<uint8_t>(space, next, x.stride);
  x.low = piece<uint8_t>(space, next, x.stride);
  x.sums = piece<float>(space, next, x.stride);
  x.unit = piece<float>(space, next, 1);
  x.column = piece<int32_t>(space, next, x.stride);
  x.start = piece<int32_t>(space, next, x.stride);
  std::vector<float> out(2 * kTileBytes);
  for (int i = 0; i < w.columns; ++i) x.value[i] = static_cast<float>(i % 7) - 3;
  make_ready({w}, x, 0, false);
  double least = 1e30;
  float sum = 0;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    for (int p = 0; p < w.pieces(); ++p) {
      if (w.by_columns()) tile_product(w, p, 0, w.padded() / w.group, x.input(0), out.data());
      sum += w.by_columns() ? out[0] : first(panel_product(w, p, x.input(0)));
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    least = std::min(least, taken.count());
  }
  asm volatile("" : : "m"(sum));  // the products are made
  return least;
}

float run_read(const float* p, int64_t count, int threads) {
  constexpr int64_t kPiece = 1 << 18;
  const int pieces = static_cast<int>(count / kPiece);
  std::vector<float> found(static_cast<size_t>(pieces));
  parallel_for(pieces, threads, [&](int i) {
    const float* at = p + i * kPiece;
    Vec sum[4] = {};
    for (int64_t j = 0; j < kPiece; j += 4 * kLanes)
      for (int k = 0; k < 4; ++k) {
        __builtin_prefetch(at + j + k * kLanes + 1024);
        sum[k] += load(at + j + k * kLanes);
      }
    found[static_cast<size_t>(i)] = sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
  });
  float total = 0;
  for (const float f : found) total += f;
  return total;
}

}  // namespace

const DecoderKernels DECODER{run_step, run_product, run_time, run_read};

}  // namespace sparseworks
