// One step of a decoder, compiled once per instruction set under the name DECODER.
#include <algorithm>
#include <array>
#include <chrono>
#include <vector>

#include "attention_impl.h"
#include "mixture_impl.h"

namespace sparseworks {
namespace {

class Run : Mixtures {
 public:
  Run(const Model& model, const Cache& cache, const Step& step, Workspace& space)
      : Mixtures(model, cache, step, space) {}

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
