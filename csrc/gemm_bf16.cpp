// The choice of the bfloat16 GEMMs. See gemm_bf16.h.
#include "gemm_bf16.h"

#ifdef ES2FAST_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace es2fast {
namespace {

#ifdef ES2FAST_X86
// AMX, and Linux's permission for this process to use its tiles: 8 KiB of state per thread that the
// kernel saves only for who asks. Refused where a signal stack is too small for them.
bool may_use_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // CPUID 7.0, EDX
  constexpr int REQUEST_PERMISSION = 0x1023;                    // ARCH_REQ_XCOMP_PERM
  constexpr int TILE_DATA = 18;                                 // XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & AMX_BF16) || !(d & AMX_TILE)) return false;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const Bf16Gemm* choose_gemm_bf16([[maybe_unused]] std::string_view capability) {
#ifdef ES2FAST_X86
  if (capability == "AVX512" && __builtin_cpu_supports("avx512bf16")) {
    return may_use_amx() ? &gemm_bf16_amx : &gemm_bf16_avx512;
  }
#endif
#ifdef ES2FAST_ARM64
  constexpr unsigned long BF16 = 1ul << 14;  // HWCAP2_BF16: BFMMLA and BFCVT
  if (getauxval(AT_HWCAP2) & BF16) return &gemm_bf16_arm64;
#endif
  return nullptr;
}

}  // namespace es2fast
