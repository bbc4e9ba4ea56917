// The Python face of the decoder. Memory is the caller's, who keeps it alive.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "../arrays.h"
#include "../dispatch.h"
#include "model.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

using Floats = Array<const float, 1>;
using Any = nb::ndarray<nb::c_contig, nb::device::cpu>;

void need(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("decoder: ") + what);
}

uint64_t bits_at(const uint8_t* p, int bytes) {
  uint64_t v = 0;
  std::memcpy(&v, p, static_cast<size_t>(bytes));
  return v;
}

// What says which rows have the groups of a panel: bytes before the first one and of each. Steps of
// kListedInt8 are those of the panel.
struct Rows {
  int64_t before = 0, group = 0;
  Rows(const Matrix& m, uint64_t steps) {
    if (m.format == Format::kGroupInt4) group = 2;
    if (m.format != Format::kListedInt8) return;
    need(steps <= kListed / 4, "more steps than 64 columns have");
    before = 4;
    group = m.group / kListed * static_cast<int64_t>(steps) * 2;
  }
};

// Bytes of the group that begins at `p`, of which `left` may be read, with the `rows` that have it;
// -1 where it does not fit.
int64_t group_bytes(const Matrix& m, const uint8_t* p, int64_t left, const uint8_t* rows,
                    int64_t bytes_of_rows) {
  const int64_t g = m.group;
  int64_t size = 0;
  switch (m.format) {
    case Format::kFloat: size = 64 * g; break;
    case Format::kHalf: size = 32 * g; break;
    case Format::kInt8: size = 32 + 16 * g; break;
    case Format::kInt4: size = 32 + 8 * g; break;
    case Format::kMaskedHalf:
      size = 2 * g;
      if (size > left) return -1;
      for (int c = 0; c < g / 2; ++c) size += 2 * __builtin_popcountll(bits_at(p + 4 * c, 4));
      break;
    case Format::kMaskedInt8:
      size = 32 + 2 * g;
      if (size > left) return -1;
      for (int c = 0; c < g / 4; ++c) size += __builtin_popcountll(bits_at(p + 32 + 8 * c, 8));
      break;
    case Format::kMaskedInt4:
      size = 32 + 2 * g;
      if (size > left) return -1;
      for (int c = 0; c < g / 8; ++c)
        size += std::max(__builtin_popcountll(bits_at(p + 32 + 16 * c, 8)),
                         __builtin_popcountll(bits_at(p + 40 + 16 * c, 8)));
      break;
    case Format::kGroupInt4:
      size = __builtin_popcountll(bits_at(rows, 2)) * ((m.zeros ? 3 : 2) + g / 2);
      break;
    case Format::kListedInt8:
      size = 32;
      for (int64_t i = 0; i < bytes_of_rows; ++i)
        size += 8 * __builtin_popcountll(bits_at(rows + i, 1));
      break;
    case Format::kColumnInt8:
    case Format::kColumnInt4: break;  // of tiles
  }
  return size <= left ? size : -1;
}

Matrix make_matrix(int format, int rows, int columns, int group, bool zeros,
                   const Array<const uint8_t, 1>& data, const Array<const int64_t, 1>& offset) {
  need(format >= 0 && format <= static_cast<int>(Format::kListedInt8), "unknown format");
  need(rows > 0 && columns > 0 && group >= 16 && group <= kWidest && kWidest % group == 0 &&
           group % (format == static_cast<int>(Format::kListedInt8) ? kListed : 16) == 0,
       "sizes of a matrix that cannot be");
  Matrix m;
  m.format = static_cast<Format>(format);
  m.rows = rows;
  m.columns = columns;
  m.group = group;
  m.zeros = zeros;
  m.data = data.data();
  m.offset = offset.data();
  need(count(offset) == m.pieces() + 1, "offsets do not fit the rows");
  need(m.offset[0] >= 0 && m.offset[m.pieces()] + kReadAhead <= count(data),
       "the bytes of a matrix end too early");
  for (int p = 0; m.by_columns() && p < m.pieces(); ++p)
    need(m.offset[p] >= 0 && m.offset[p + 1] - m.offset[p] == m.padded() / group * m.group_bytes(p),
         "a tile of a matrix of another size");
  for (int p = 0; !m.by_columns() && p < m.panels(); ++p) {
    int64_t at = m.offset[p] + (m.integers() ? 64 : 0);
    need(m.offset[p] >= 0 && at <= m.offset[p + 1] && m.offset[p + 1] <= m.offset[m.pieces()],
         "a panel of a matrix is longer than its bytes");
    const Rows about(m, bits_at(m.data + at, 4));
    const uint8_t* kept = m.data + at + about.before;
    at += about.before + m.padded() / group * about.group;
    need(at <= m.offset[p + 1], "a panel of a matrix is longer than its bytes");
    for (int c = 0; c < m.padded(); c += group, kept += about.group) {
      const int64_t size =
          at <= m.offset[p + 1]
              ? group_bytes(m, m.data + at, m.offset[p + 1] - at, kept, about.group) : -1;
      need(size >= 0, "a panel of a matrix is longer than its bytes");
      at += size;
    }
    need(at == m.offset[p + 1], "a panel of a matrix is shorter than its bytes");
  }
  return m;
}

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

void check_linear(const Linear& l, int rows, int columns) {
  need(l.weight.data && l.weight.rows == rows && l.weight.columns == columns,
       "matrices that do not fit together");
}

void check_mlp(const Mlp& m, int width) {
  const int hidden = m.down.weight.columns;
  const int padded = (hidden + kPanel - 1) / kPanel * kPanel;
  check_linear(m.down, width, hidden);
  check_linear(m.up, m.gated ? 2 * padded : hidden, width);
}

void check_model(const Model& m) {
  need(m.width > 0 && m.embedding.data && !m.layers.empty(), "a model without layers");
  need(m.head.weight.data && m.head.weight.columns == m.width, "a head of another width");
  for (const Layer& l : m.layers) {
    const Attention& a = l.attention;
    need(a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.size > 0,
         "heads that do not divide");
    check_linear(a.qkv, (a.heads + 2 * a.kv_heads) * a.size, m.width);
    check_linear(a.out, m.width, a.heads * a.size);
    need(a.rotary < static_cast<int>(m.rotary.size()), "no such table of rotations");
    if (a.rotary >= 0) {
      const Rotary& r = m.rotary[static_cast<size_t>(a.rotary)];
      need(r.table && r.dims > 0 && r.dims % 2 == 0 && r.dims <= a.size, "rotations too wide");
    }
    const Mixture& x = l.mixture;
    if (x.chosen == 0) {
      check_mlp(l.mlp, m.width);
      continue;
    }
    need(!x.router.weight.by_columns(), "columns of a router cannot be gathered");
    need(x.count() >= x.chosen, "fewer experts than are chosen");
    check_linear(x.router, x.count() + x.shared, m.width);
    for (const Mlp& e : x.experts) {
      check_mlp(e, m.width);
      need(!e.up.weight.by_columns() && !e.down.weight.by_columns(),
           "columns of experts cannot be gathered");
      need(e.up.weight.format == x.experts[0].up.weight.format &&
               e.up.weight.zeros == x.experts[0].up.weight.zeros,
           "experts in several formats");
    }
  }
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
