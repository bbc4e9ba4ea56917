// The Python face of the decoder. Memory is the caller's, who keeps it alive.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "../dispatch.h"
#include "checks.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

using Floats = Array<const float, 1>;
using Any = nb::ndarray<nb::c_contig, nb::device::cpu>;

Table make_table(const Any& a, int width) {
  need(a.ndim() == 2 && static_cast<int>(a.shape(1)) == width, "a table of another width");
  Table t;
  t.data = a.data();
  t.rows = static_cast<int>(a.shape(0));
  if (a.dtype() == nb::dtype<float>()) t.kind = 0;
  else if (a.dtype() == nb::dtype<uint16_t>()) t.kind = 1;  // bf16
  else if (a.dtype() == nb::dtype<int16_t>()) t.kind = 2;   // fp16
  else throw std::invalid_argument("decoder: tables are fp32, bf16 or fp16");
  return t;
}

struct Caches {
  Cache cache;
};

void run(const Model& m, const Caches& c, Workspace& space, const Array<const int32_t, 1>& token,
         const Array<const int32_t, 1>& text, const Array<const int32_t, 1>& position,
         const Array<const int32_t, 1>& want, const Array<float, 2>& logits, int threads) {
  const int64_t tokens = count(token);
  need(tokens > 0 && count(text) == tokens && count(position) == tokens && threads > 0 &&
           count(want) == count(logits) && count(want) <= tokens &&
           count(logits, 1) == m.head.weight.rows && c.cache.layers.size() == m.layers.size(),
       "the arrays of a step do not fit together");
  int positions = c.cache.capacity;
  for (const Rotary& r : m.rotary) positions = std::min(positions, r.positions);
  if (m.positions.data) positions = std::min(positions, m.positions.rows - m.position_offset);
  for (int64_t i = 0; i < tokens; ++i)
    need(token.data()[i] >= 0 && token.data()[i] < m.embedding.rows && text.data()[i] >= 0 &&
             text.data()[i] < c.cache.texts && position.data()[i] >= 0 &&
             position.data()[i] < positions,
         "a token, text or position that is not there");
  for (int64_t i = 0; i < count(want); ++i)
    need(want.data()[i] >= 0 && want.data()[i] < tokens, "logits of no token");
  Step s;
  s.tokens = static_cast<int>(tokens);
  s.token = token.data();
  s.text = text.data();
  s.position = position.data();
  s.wanted = static_cast<int>(count(want));
  s.want = want.data();
  s.logits = logits.data();
  s.threads = threads;
  nb::gil_scoped_release release;
  decoder().step(m, c.cache, s, space);
}

void product(const Matrix& w, const Array<const float, 2>& x, const Array<float, 2>& y,
             int threads) {
  need(count(x) == count(y) && count(x) > 0 && count(x, 1) == w.columns && count(y, 1) == w.rows &&
           threads > 0,
       "the arrays of a product do not fit together");
  nb::gil_scoped_release release;
  decoder().product(w, x.data(), static_cast<int>(count(x)), y.data(), threads);
}

}  // namespace

void define_decoder(nb::module_& module) {
  nb::module_ d = module.def_submodule("decoder");
  nb::class_<Matrix>(d, "Matrix")
      .def_ro("rows", &Matrix::rows)
      .def_ro("columns", &Matrix::columns);
  d.def("matrix", &make_matrix);
  nb::class_<Linear>(d, "Linear")
      .def("__init__", [](Linear* l, const Matrix& w, const std::optional<Floats>& bias) {
        need(!bias || count(*bias) >= w.panels() * kPanel, "a bias that ends before its panels");
        new (l) Linear{w, bias ? bias->data() : nullptr, {}};
      }, nb::arg("weight"), nb::arg("bias").none())
      .def("set_active", [](Linear& l, float threshold, int keep, const std::optional<Floats>& weight) {
        need(!weight || count(*weight) == l.weight.columns, "weights of inputs that do not fit");
        l.active = {threshold, keep, weight ? weight->data() : nullptr};
      }, nb::arg("threshold"), nb::arg("keep"), nb::arg("weight").none());
  nb::class_<Norm>(d, "Norm")
      .def("__init__", [](Norm* n, int kind, int size, const std::optional<Floats>& weight,
                          const std::optional<Floats>& bias, float eps) {
        need((!weight || count(*weight) == size) && (!bias || count(*bias) == size),
             "a norm of another width");
        new (n) Norm{static_cast<NormKind>(kind), weight ? weight->data() : nullptr,
                     bias ? bias->data() : nullptr, eps};
      }, nb::arg("kind"), nb::arg("size"), nb::arg("weight").none(), nb::arg("bias").none(),
           nb::arg("eps"));
  nb::class_<Attention>(d, "Attention")
      .def(nb::init<>())
      .def_rw("qkv", &Attention::qkv)
      .def_rw("out", &Attention::out)
      .def_rw("query_norm", &Attention::query_norm)
      .def_rw("key_norm", &Attention::key_norm)
      .def_rw("heads", &Attention::heads)
      .def_rw("kv_heads", &Attention::kv_heads)
      .def_rw("size", &Attention::size)
      .def_rw("scale", &Attention::scale)
      .def_rw("softcap", &Attention::softcap)
      .def_rw("window", &Attention::window)
      .def_rw("rotary", &Attention::rotary);
  nb::class_<Mlp>(d, "Mlp")
      .def("__init__", [](Mlp* m, const Linear& up, const Linear& down, bool gated, int activation) {
        need(activation >= 0 && activation <= static_cast<int>(Activation::kTanh),
             "unknown activation");
        new (m) Mlp{up, down, gated, static_cast<Activation>(activation)};
      });
  nb::class_<Mixture>(d, "Mixture")
      .def("__init__", [](Mixture* m, const Linear& router, const std::vector<Mlp>& experts,
                          int chosen, bool shared, bool normalized) {
        new (m) Mixture{router, experts, chosen, shared, normalized};
      });
  nb::class_<Layer>(d, "Layer")
      .def(nb::init<>())
      .def_rw("before_attention", &Layer::before_attention)
      .def_rw("after_attention", &Layer::after_attention)
      .def_rw("before_mlp", &Layer::before_mlp)
      .def_rw("after_mlp", &Layer::after_mlp)
      .def_rw("attention", &Layer::attention)
      .def_rw("mlp", &Layer::mlp)
      .def_rw("mixture", &Layer::mixture)
      .def_rw("parallel", &Layer::parallel)
      .def_rw("residual", &Layer::residual);
  nb::class_<Model>(d, "Model")
      .def("__init__", [](Model* m, int width) { new (m) Model; m->width = width; })
      .def("set_embedding", [](Model& m, const Any& table) {
        m.embedding = make_table(table, m.width);
      })
      .def("set_positions", [](Model& m, const Any& table, int offset) {
        need(offset >= 0, "positions before the first");
        m.positions = make_table(table, m.width);
        m.position_offset = offset;
      })
      .def("add_rotary", [](Model& m, const Array<const float, 2>& table) {
        m.rotary.push_back({table.data(), static_cast<int>(count(table, 1)),
                            static_cast<int>(count(table))});
      })
      .def("set_rotary", [](Model& m, int which, const Array<const float, 2>& table) {
        Rotary& r = m.rotary.at(static_cast<size_t>(which));
        need(count(table, 1) == r.dims, "rotations of another width");
        r.table = table.data();
        r.positions = static_cast<int>(count(table));
      })
      .def("add_layer", [](Model& m, const Layer& l) { m.layers.push_back(l); })
      .def("check", &check_model)
      .def_rw("head", &Model::head)
      .def_rw("embedding_scale", &Model::embedding_scale)
      .def_rw("embedding_norm", &Model::embedding_norm)
      .def_rw("final_norm", &Model::final_norm)
      .def_rw("logit_softcap", &Model::logit_softcap)
      .def_rw("logit_scale", &Model::logit_scale);
  nb::class_<Caches>(d, "Cache")
      .def("__init__", [](Caches* c, int kind, int texts, int capacity) {
        need(texts > 0 && capacity > 0 && capacity % kPanel == 0, "a cache of no size");
        new (c) Caches;
        c->cache.kind = static_cast<CacheKind>(kind);
        c->cache.texts = texts;
        c->cache.capacity = capacity;
      })
      .def("add_layer", [](Caches& c, int heads, int size, const Any& key, const Any& value,
                           const std::optional<Array<float, 1>>& key_scale,
                           const std::optional<Array<float, 1>>& value_scale) {
        const int64_t rows = static_cast<int64_t>(c.cache.texts) * heads * c.cache.capacity;
        const size_t bytes = c.cache.kind == CacheKind::kFloat ? 4
                             : c.cache.kind == CacheKind::kHalf ? 2 : 1;
        const bool scaled = c.cache.kind == CacheKind::kInt8;
        const int64_t padded = (size + kPanel - 1) / kPanel * kPanel;
        need(static_cast<int64_t>(key.size()) == rows * padded && key.size() == value.size() &&
                 key.itemsize() == bytes && value.itemsize() == bytes &&
                 (!scaled || (key_scale && value_scale && count(*key_scale) == rows &&
                              count(*value_scale) == rows)),
             "the memory of a cache does not fit");
        c.cache.layers.push_back({key.data(), value.data(), scaled ? key_scale->data() : nullptr,
                                  scaled ? value_scale->data() : nullptr});
      }, nb::arg("heads"), nb::arg("size"), nb::arg("key"), nb::arg("value"),
           nb::arg("key_scale").none(), nb::arg("value_scale").none());
  nb::class_<Workspace>(d, "Workspace").def(nb::init<>());
  d.def("run", &run);
  d.def("product", &product);
  d.def("time", [](const Matrix& w, int repeats) {
    nb::gil_scoped_release release;
    return decoder().time(w, repeats);
  });
  d.def("read", [](const Floats& memory, int threads) {
    nb::gil_scoped_release release;
    return decoder().read(memory.data(), count(memory), threads);
  });
}
