// Which kernel runs on this processor.
#pragma once

#include <string>

#include "gathered.h"
#include "program.h"
#include "spmm.h"
#include "spmv.h"

namespace sparseworks {

// The instruction set in use: "avx512", "avx2" or "base"; SPARSEWORKS_ISA may force a lower one.
// Throws std::runtime_error when a forced one is unknown or not there.
std::string instruction_set();

Spmm spmm();

RunOp run_op();

// The batch-1 products use AVX-512 VBMI2, VNNI and BF16 where they are there.
const Spmv& spmv();

const Gathered& gathered();

}  // namespace sparseworks
