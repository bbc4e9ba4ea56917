#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparseworks {
namespace {

enum Level { kBase, kAvx2, kAvx512f, kAvx512Vbmi2, kAvx512 };

constexpr const char* kNames[] = {"base", "avx2", "avx512f", "avx512vbmi2", "avx512"};

bool has(Level level) {
  if (level == kBase) return true;
#if defined(__x86_64__)
  if (level == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool plain = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (level != kAvx512Vbmi2) return plain;  // "avx512" takes what there is beyond
  return plain && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

Level level() {
  if (const char* forced = std::getenv("SPARSEWORKS_ISA"); forced != nullptr && *forced) {
    const std::string name = forced;
    for (const Level l : {kBase, kAvx2, kAvx512f, kAvx512Vbmi2, kAvx512})
      if (name == kNames[l]) {
        if (has(l)) return l;
        throw std::runtime_error("SPARSEWORKS_ISA=" + name + ": this processor does not have it");
      }
    throw std::runtime_error("SPARSEWORKS_ISA=" + name +
                             ": use avx512, avx512vbmi2, avx512f, avx2 or base");
  }
  return has(kAvx512) ? kAvx512 : has(kAvx2) ? kAvx2 : kBase;
}

bool has_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// The one for the level, of kernels that need no more than AVX-512 F, BW, VL and DQ.
template <typename T>
T choose(T base, T avx2, T avx512) {
  const Level l = level();
  return l >= kAvx512f ? avx512 : l == kAvx2 ? avx2 : base;
}

}  // namespace

std::string instruction_set() { return kNames[level()]; }

RunOp run_op() {
  const Level l = level();
  if (l == kAvx512 && has_bf16()) return run_op_bf16;
  if (l >= kAvx512Vbmi2 && has_vnni()) return run_op_vnni;
  return choose(run_op_base, run_op_avx2, run_op_avx512);
}

const Spmv& spmv() {
  const Level l = level();
  if (l >= kAvx512Vbmi2 && has(kAvx512Vbmi2))
    return l == kAvx512 && has_bf16() ? spmv_bf16 : spmv_vbmi2;
  return l == kBase ? spmv_base : spmv_avx2;
}

const Gathered& gathered() { return *choose(&gathered_base, &gathered_avx2, &gathered_avx512); }

BlockProduct block_product() {
  if (level() == kAvx512 && has_bf16()) return block_bf16;
  return choose(block_base, block_avx2, block_avx512);
}

GroupedProduct grouped_product() {
  if (level() == kAvx512 && has_bf16()) return grouped_bf16;
  return choose(grouped_base, grouped_avx2, grouped_avx512);
}

KeepOnly keep_only() { return choose(keep_only_base, keep_only_avx2, keep_only_avx512); }

KeepLargest keep_largest() {
  return choose(keep_largest_base, keep_largest_avx2, keep_largest_avx512);
}

Eliminate eliminate() { return choose(eliminate_base, eliminate_avx2, eliminate_avx512); }

const DecoderKernels& decoder() {
  const Level l = level();
  if (l == kAvx512 && has_bf16()) return has_amx() ? decoder_amx : decoder_bf16;
  if (l >= kAvx512Vbmi2 && has(kAvx512Vbmi2)) return decoder_vbmi2;
  return l == kBase ? decoder_base : decoder_avx2;
}

bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d >> 22 & 1) == 0) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

}  // namespace sparseworks
