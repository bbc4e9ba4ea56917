// The Python face of Program: operations come as dictionaries of their fields.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "program.h"

namespace nb = nanobind;
using namespace sparseworks;

namespace {

template <typename T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Dense = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

// Keeps alive what its operations point to.
struct Held {
  Program program;
  std::vector<nb::object> owners;
};

// What an operation reads in programs of all sizes.
struct Weights {
  Taps taps;
  const float *bias = nullptr, *scale = nullptr;
  std::vector<nb::object> owners;
};

int number(const nb::dict& d, const char* key, int otherwise) {
  return d.contains(key) ? nb::cast<int>(d[key]) : otherwise;
}

Geometry geometry(const nb::dict& d, const char* key) {
  Geometry g;
  if (!d.contains(key)) return g;
  const auto v = nb::cast<std::vector<int64_t>>(d[key]);
  if (v.size() != 8) throw std::invalid_argument("a geometry has 8 numbers");
  g.height = static_cast<int>(v[0]);
  g.width = static_cast<int>(v[1]);
  g.pad = static_cast<int>(v[2]);
  g.lanes = static_cast<int>(v[3]);
  g.pitch = v[4];
  g.plane = v[5];
  g.origin = v[6];
  g.bands = static_cast<int>(v[7]);
  return g;
}

template <typename T, typename Owner>
const T* pointer(Owner& held, const nb::dict& d, const char* key, size_t* count = nullptr) {
  if (!d.contains(key)) return nullptr;
  held.owners.push_back(d[key]);
  auto array = nb::cast<Array<const T>>(d[key]);
  if (count != nullptr) *count = array.shape(0);
  return array.data();
}

// Which lanes of each vector of a run are pixels.
std::vector<uint16_t> live_lanes(const Geometry& g, bool flat) {
  const int64_t length = flat ? (g.height - 1) * g.pitch + g.width : g.width;
  std::vector<uint16_t> live((length + 15) / 16, 0);
  for (int64_t p = 0; p < length; ++p)
    if (p % g.pitch < g.width) live[p / 16] |= static_cast<uint16_t>(1u << p % 16);
  return live;
}

Weights read_weights(const nb::dict& d) {
  Weights held;
  Taps& taps = held.taps;
  held.bias = pointer<float>(held, d, "bias");
  held.scale = pointer<float>(held, d, "scale");
  if (!d.contains("start")) return held;
  taps.rows = number(d, "rows", 0);
  taps.group = number(d, "group", 1);
  taps.blocks = number(d, "blocks", 1);
  taps.channels = number(d, "word", 1);
  taps.chunk = number(d, "chunk", 1);
  taps.width = number(d, "width", 0);
  size_t starts = 0, columns = 0, values = 0;
  taps.start = pointer<int64_t>(held, d, "start", &starts);
  taps.column = pointer<uint16_t>(held, d, "column", &columns);
  taps.value = pointer<float>(held, d, "value", &values);
  if (taps.blocks < 1 || (taps.group != 1 && taps.group != 4))
    throw std::invalid_argument("a product's taps do not fit together");
  const size_t in_block = (taps.rows + taps.group - 1) / taps.group;
  const size_t groups = in_block * taps.blocks;
  size_t places = groups, zeros = taps.rows;
  taps.order = pointer<int32_t>(held, d, "order", &places);
  taps.zero = pointer<int32_t>(held, d, "zero", &zeros);
  if (starts != groups + 1 || columns != static_cast<size_t>(taps.start[groups]) ||
      values != columns * taps.group || places != groups || taps.chunk < 1 ||
      zeros != static_cast<size_t>(taps.rows) || Taps::kTogether % taps.chunk != 0)
    throw std::invalid_argument("a product's taps do not fit together");
  for (int b = 0; b < taps.blocks; ++b)
    for (int64_t t = taps.start[b * in_block]; t < taps.start[(b + 1) * in_block]; ++t)
      taps.columns = std::max(taps.columns, b * taps.width + taps.column[t] + 1);
  return held;
}

// How far from a position its taps read: input c and place k of a kernel at c * step + near[k].
void lay_out_taps(Op& op, const nb::dict& d) {
  const auto near = nb::cast<std::vector<int64_t>>(d["near"]);
  const int64_t step = nb::cast<int64_t>(d["step"]);
  const int inputs = number(d, "inputs", 0), parts = number(d, "divided", 1);
  if (op.taps.rows != op.channels || op.taps.columns > static_cast<int64_t>(inputs * near.size()) ||
      parts < 1 || op.channels % parts != 0)
    throw std::invalid_argument("a product's taps do not fit its input");
  Taps& taps = op.taps;
  if (near.size() == 1 && op.stride == 1 && parts == 1) {
    taps.near = near[0];
    taps.step = step;
    return;
  }
  std::vector<int64_t> distance;  // of each column
  for (int c = 0; c < inputs; ++c)
    for (const int64_t k : near) distance.push_back(c * step + k);
  const int groups = (taps.rows + taps.group - 1) / taps.group, each = op.channels / parts;
  op.offset.resize(taps.start[static_cast<int64_t>(taps.blocks) * groups]);
  for (int64_t place = 0; place < static_cast<int64_t>(taps.blocks) * groups; ++place) {
    const int group = taps.order == nullptr ? static_cast<int>(place % groups) : taps.order[place];
    const int64_t base = static_cast<int64_t>(group * taps.group / each) * inputs * step;
    const int64_t* of = distance.data() + place / groups * taps.width;
    for (int64_t t = taps.start[place]; t < taps.start[place + 1]; ++t)
      op.offset[t] = static_cast<int32_t>(base + of[taps.column[t]]);
  }
  taps.offset = op.offset.data();
}

Op parse(Held& held, const nb::dict& d) {
  Op op{};
  op.kind = static_cast<Kind>(nb::cast<int>(d["kind"]));
  op.out = number(d, "out", -1);
  op.in = number(d, "in", -1);
  op.other = number(d, "other", -1);
  op.extra = number(d, "extra", -1);
  op.tensor = number(d, "tensor", -1);
  op.layout = static_cast<Layout>(number(d, "layout", 0));
  op.channels = number(d, "channels", 0);
  op.stride = number(d, "stride", 1);
  op.flat = number(d, "flat", 0) != 0;
  op.apart = d.contains("apart") ? nb::cast<int64_t>(d["apart"]) : 0;
  op.planes = number(d, "planes", 0);
  op.copies = number(d, "copies", 0);
  op.from = geometry(d, "from");
  op.to = geometry(d, "to");
  op.activation = static_cast<Activation>(number(d, "activation", 0));
  op.number = d.contains("number") ? nb::cast<float>(d["number"]) : 0.0f;
  op.window = number(d, "window", 0);
  op.padding = number(d, "padding", 0);
  op.flag = number(d, "flag", 0) != 0;
  op.broadcast = number(d, "broadcast", 0) != 0;
  op.heads = number(d, "heads", 0);
  op.groups = number(d, "groups", 0);
  op.q = number(d, "q", 0);
  op.k = number(d, "k", 0);
  op.v = number(d, "v", 0);
  op.q_step = number(d, "q_step", 1);
  op.k_step = number(d, "k_step", 1);
  op.mask = number(d, "mask", -1);
  op.added = number(d, "added", -1);
  op.windows = number(d, "windows", 1);
  op.keys = number(d, "keys", 0);
  op.parts = number(d, "parts", 1);
  op.slots = number(d, "slots", 0);
  op.shift = number(d, "shift", 0);
  op.bias = pointer<float>(held, d, "bias");
  op.scale = pointer<float>(held, d, "scale");
  if (op.kind == Kind::kMove) {
    size_t to = 0, from = 0, weights = 0;
    op.moves.to = pointer<int32_t>(held, d, "places", &to);
    op.moves.from = pointer<int32_t>(held, d, "sources", &from);
    op.moves.weight = pointer<float>(held, d, "shares", &weights);
    op.moves.count = static_cast<int>(to);
    op.moves.taps = to == 0 ? 1 : static_cast<int>(from / to);
    if (from != to * op.moves.taps || (op.moves.weight == nullptr && op.moves.taps != 1) ||
        (op.moves.weight != nullptr && weights != from))
      throw std::invalid_argument("the positions of a move do not fit together");
  }
  if (op.kind == Kind::kAttention && (op.windows < 1 || op.from.width % op.windows != 0))
    throw std::invalid_argument("windows of attention do not fill its positions");
  if (number(d, "live", 0) != 0) op.live = live_lanes(op.to, op.flat);
  if (d.contains("weights")) {
    held.owners.push_back(d["weights"]);
    const Weights& weights = nb::cast<const Weights&>(d["weights"]);
    op.taps = weights.taps;
    op.bias = weights.bias;
    op.scale = weights.scale;
  }
  if (op.kind == Kind::kProduct) lay_out_taps(op, d);
  return op;
}

std::vector<Tensor> tensors(const std::vector<Dense>& arrays) {
  std::vector<Tensor> found;
  for (const Dense& a : arrays) {
    const int64_t items = a.ndim() == 0 ? 1 : static_cast<int64_t>(a.shape(0));
    const int64_t size = items == 0 ? 0 : static_cast<int64_t>(a.size()) / items;
    found.push_back({const_cast<float*>(a.data()), items, size});
  }
  return found;
}

}  // namespace

void define_program(nb::module_& m) {
  nb::class_<Arena>(m, "Arena").def(nb::init<>()).def_prop_ro("bytes", &Arena::bytes);
  nb::class_<Weights>(m, "Weights").def("__init__", [](Weights* self, const nb::dict& d) {
    new (self) Weights(read_weights(d));
  });
  nb::class_<Held>(m, "Program")
      .def("__init__",
           [](Held* self, std::vector<int64_t> where, int64_t size, int lanes, nb::object arena,
              const std::vector<nb::dict>& ops) {
             Arena* memory = nb::cast<Arena*>(arena);
             new (self) Held{Program(std::move(where), size, lanes, memory), {arena}};
             try {
               for (const nb::dict& d : ops) self->program.add(parse(*self, d));
             } catch (...) {
               self->~Held();
               throw;
             }
           },
           nb::arg("where"), nb::arg("size"), nb::arg("lanes"), nb::arg("arena"), nb::arg("ops"))
      .def_prop_ro("bytes", [](const Held& self) { return self.program.bytes(); })
      .def("run",
           [](const Held& self, const std::vector<Dense>& arrays, int64_t entries, int threads) {
             const std::vector<Tensor> given = tensors(arrays);
             nb::gil_scoped_release release;
             self.program.run(given, entries, threads);
           },
           nb::arg("tensors"), nb::arg("entries"), nb::arg("threads"))
      .def("profile",
           [](const Held& self, const std::vector<Dense>& arrays, int64_t entries, int repeats) {
             const std::vector<Tensor> given = tensors(arrays);
             nb::gil_scoped_release release;
             return self.program.profile(given, entries, repeats);
           },
           nb::arg("tensors"), nb::arg("entries"), nb::arg("repeats"));
}
