// The Python module. Tensors come in through DLPack; memory is the caller's.
#include <nanobind/stl/string.h>

#include "arrays.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace sparseworks;

void define_program(nb::module_& m);   // program_module.cpp
void define_spmv(nb::module_& m);      // spmv_module.cpp
void define_gathered(nb::module_& m);  // gathered_module.cpp
void define_block(nb::module_& m);     // block_module.cpp
void define_nm(nb::module_& m);        // nm_module.cpp
void define_zeroing(nb::module_& m);   // zeroing_module.cpp
void define_selection(nb::module_& m);    // selection_module.cpp
void define_elimination(nb::module_& m);  // elimination_module.cpp
void define_decoder(nb::module_& m);   // decoder/module.cpp

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of sparseworks.";
  nb::set_leak_warnings(false);  // programs may live as long as the process
  m.def("instruction_set", &instruction_set);
  m.def("has_amx", &has_amx);
  define_program(m);
  define_spmv(m);
  define_gathered(m);
  define_block(m);
  define_nm(m);
  define_zeroing(m);
  define_selection(m);
  define_elimination(m);
  define_decoder(m);
}
