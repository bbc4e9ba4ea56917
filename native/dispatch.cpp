#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace sparseworks {
namespace {

bool has(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return name == "base";
}

}  // namespace

std::string instruction_set() {
  if (const char* forced = std::getenv("SPARSEWORKS_ISA"); forced != nullptr && *forced) {
    const std::string name = forced;
    if (name != "avx512" && name != "avx2" && name != "base")
      throw std::runtime_error("SPARSEWORKS_ISA=" + name + ": use avx512, avx2 or base");
    if (!has(name))
      throw std::runtime_error("SPARSEWORKS_ISA=" + name + ": this processor does not have it");
    return name;
  }
  return has("avx512") ? "avx512" : has("avx2") ? "avx2" : "base";
}

Spmm spmm() {
  const std::string name = instruction_set();
  return name == "avx512" ? spmm_avx512 : name == "avx2" ? spmm_avx2 : spmm_base;
}

RunOp run_op() {
  const std::string name = instruction_set();
  return name == "avx512" ? run_op_avx512 : name == "avx2" ? run_op_avx2 : run_op_base;
}

const Spmv& spmv() {
  const std::string name = instruction_set();
#if defined(__x86_64__)
  if (name == "avx512" && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512vnni"))
    return __builtin_cpu_supports("avx512bf16") ? spmv_bf16 : spmv_vbmi2;
  if (name != "base") return spmv_avx2;
#endif
  return spmv_base;
}

const Gathered& gathered() {
  const std::string name = instruction_set();
  return name == "avx512" ? gathered_avx512 : name == "avx2" ? gathered_avx2 : gathered_base;
}

}  // namespace sparseworks
