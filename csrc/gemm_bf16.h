// bfloat16 GEMMs whose results keep the float32 of their accumulators.
//
// torch's CPU GEMM rounds its result to the type of its inputs, and logits rounded to bfloat16 are
// useless next to the teacher; upcasting the head costs 2.7 times the multiply time. These use the
// CPU's bfloat16 dot products. Every output element is summed in one order, whatever the threads.
//
// One table per instruction set, made from a kernel of gemm_bf16_<set>.cpp by the blocking of
// gemm_bf16_panels.inl; gemm_bf16.cpp picks the one of this machine.
#pragma once

#include <cstdint>
#include <string_view>

namespace es2fast {

struct Bf16Matrix {
  const uint16_t* data;
  int64_t stride;  // elements from one row to the next
};

struct Fp32Matrix {
  float* data;
  int64_t stride;
};

constexpr int64_t PANEL = 64;     // columns of the result per panel
constexpr int64_t K_BLOCK = 512;  // of k per packed panel, which then takes 64 KiB
constexpr int64_t PANEL_SCRATCH = K_BLOCK / 2 * PANEL;  // uint32 elements

// `panel` counts panels of PANEL columns of the result; memory for packed operands begins at a
// multiple of 64 bytes, so that no vector straddles two cache lines.
struct Bf16Gemm {
  const char* name;
  int64_t k_group;  // elements of k multiplied at once; packed operands end in zeros up to a multiple
  int64_t tn_rows;  // rows of the result per call of tn_block

  // out (m, n) = a (m, k) b (n, k)^T
  void (*nt_panel)(Bf16Matrix a, Bf16Matrix b, Fp32Matrix out, int64_t m, int64_t n, int64_t k,
                   int64_t panel, uint32_t* scratch);
  // out (m, n) (+)= a (m, k) b (k, n)
  void (*nn_panel)(Bf16Matrix a, Bf16Matrix b, Fp32Matrix out, int64_t m, int64_t n, int64_t k,
                   bool add, int64_t panel, uint32_t* scratch);
  // out (k, n) (+)= a (m, k)^T b (m, n), by blocks of tn_rows rows of the result; `packed` holds b as
  // pack_tn_panel leaves it, ceil(n / PANEL) panels of tn_pairs x PANEL, `scratch` has room for
  // tn_pairs x tn_rows, `out` is the block's own; tn_pairs: half of m rounded up to k_group
  void (*pack_tn_panel)(Bf16Matrix b, int64_t m, int64_t n, int64_t panel, uint32_t* packed);
  void (*tn_block)(Bf16Matrix a, const uint32_t* packed, Fp32Matrix out, int64_t m, int64_t n,
                   int64_t k, bool add, int64_t block, uint32_t* scratch);

  // Rounded to nearest even.
  void (*to_bf16)(Fp32Matrix in, int64_t rows, int64_t columns, uint16_t* out, int64_t stride);
};

#ifdef ES2FAST_X86
extern const Bf16Gemm gemm_bf16_avx512;
extern const Bf16Gemm gemm_bf16_amx;
#endif
#ifdef ES2FAST_ARM64
extern const Bf16Gemm gemm_bf16_arm64;
#endif

// The fastest one that this machine has, or null; `capability`: what torch is limited to.
const Bf16Gemm* choose_gemm_bf16(std::string_view capability);

}  // namespace es2fast
