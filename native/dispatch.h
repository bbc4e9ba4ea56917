// Which kernel runs on this processor.
#pragma once

#include <string>

#include "block.h"
#include "decoder/model.h"
#include "elimination.h"
#include "gathered.h"
#include "nm.h"
#include "program.h"
#include "selection.h"
#include "spmv.h"
#include "zeroing.h"

namespace sparseworks {

// The instruction set in use: "avx512" with all its extensions that are there, "avx512vbmi2" (without
// BF16), "avx512f" (F, BW, VL and DQ alone), "avx2" or "base"; SPARSEWORKS_ISA may force a lower one.
// Throws std::runtime_error when a forced one is unknown or not there.
std::string instruction_set();

RunOp run_op();

// The batch-1 products use AVX-512 VBMI2, VNNI and BF16 where they are there.
const Spmv& spmv();

const Gathered& gathered();

BlockProduct block_product();

GroupedProduct grouped_product();

KeepOnly keep_only();

KeepLargest keep_largest();

Eliminate eliminate();

const DecoderKernels& decoder();

// Whether the processor has AMX tiles for bf16 and the system lets this process use them.
bool has_amx();

}  // namespace sparseworks
