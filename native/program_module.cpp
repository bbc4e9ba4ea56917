// The Python face of Program: operations come as dictionaries of their fields.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

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

template <typename T>
const T* pointer(Held& held, const nb::dict& d, const char* key, size_t* count = nullptr) {
  if (!d.contains(key)) return nullptr;
  held.owners.push_back(d[key]);
  auto array = nb::cast<Array<const T>>(d[key]);
  if (count != nullptr) *count = array.shape(0);
  return array.data();
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
  size_t live = 0;
  if (const uint16_t* p = pointer<uint16_t>(held, d, "live", &live)) op.live.assign(p, p + live);
  if (op.kind == Kind::kMove) {
    size_t to = 0, from = 0, weights = 0;
    op.moves.to = pointer<int32_t>(held, d, "places", &to);
    op.moves.from = pointer<int32_t>(held, d, "sources", &from);
    op.moves.weight = pointer<float>(held, d, "weights", &weights);
    op.moves.count = static_cast<int>(to);
    op.moves.taps = to == 0 ? 1 : static_cast<int>(from / to);
    if (from != to * op.moves.taps || (op.moves.weight == nullptr && op.moves.taps != 1) ||
        (op.moves.weight != nullptr && weights != from))
      throw std::invalid_argument("the positions of a move do not fit together");
  }
  if (op.kind == Kind::kAttention && (op.windows < 1 || op.from.width % op.windows != 0))
    throw std::invalid_argument("windows of attention do not fill its positions");
  if (op.kind == Kind::kProduct) {
    op.taps.rows = op.channels;
    op.taps.group = number(d, "group", 1);
    op.taps.blocks = number(d, "blocks", 1);
    op.taps.channels = number(d, "word", 1);
    size_t starts = 0, offsets = 0, values = 0;
    op.taps.start = pointer<int64_t>(held, d, "start", &starts);
    op.taps.offset = pointer<int32_t>(held, d, "offset", &offsets);
    op.taps.value = pointer<float>(held, d, "value", &values);
    const size_t groups =
        (op.taps.rows + op.taps.group - 1) / op.taps.group * static_cast<size_t>(op.taps.blocks);
    size_t places = groups, zeros = op.taps.rows;
    op.taps.chunk = number(d, "chunk", 1);
    op.taps.order = pointer<int32_t>(held, d, "order", &places);
    op.taps.zero = pointer<int32_t>(held, d, "zero", &zeros);
    if (op.taps.blocks < 1 || (op.taps.group != 1 && op.taps.group != 4) || starts != groups + 1 ||
        offsets != static_cast<size_t>(op.taps.start[groups]) ||
        values != offsets * op.taps.group || places != groups || op.taps.chunk < 1 ||
        zeros != static_cast<size_t>(op.taps.rows) ||
        Taps::kTogether % op.taps.chunk != 0)
      throw std::invalid_argument("a product's taps do not fit together");
  }
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
  nb::class_<Held>(m, "Program")
      .def("__init__",
           [](Held* self, std::vector<int64_t> where, int64_t arena, int lanes,
              const std::vector<nb::dict>& ops) {
             new (self) Held{Program(std::move(where), arena, lanes), {}};
             try {
               for (const nb::dict& d : ops) self->program.add(parse(*self, d));
             } catch (...) {
               self->~Held();
               throw;
             }
           },
           nb::arg("where"), nb::arg("arena"), nb::arg("lanes"), nb::arg("ops"))
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
