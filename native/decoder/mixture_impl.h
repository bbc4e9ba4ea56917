// Experts: a router, the chosen ones of each token, and their sum.
#pragma once

#include <algorithm>
#include <cmath>

#include "products_impl.h"

namespace sparseworks {
namespace {

class Mixtures : protected Products {
 protected:
  using Products::Products;

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

 private:
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
};

}  // namespace
}  // namespace sparseworks
