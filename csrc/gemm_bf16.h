// bfloat16 GEMMs whose results keep the float32 of their accumulators.
//
// torch's CPU GEMM rounds its result to the type of its inputs, and logits rounded to bfloat16 are
// useless next to the teacher; upcasting the head costs 2.7 times the multiply time. These use
// AVX-512's bfloat16 dot product. Every output element is summed in one order, whatever the threads.
#pragma once

#include <cstdint>

namespace es2fast {

struct Bf16Matrix {
  const uint16_t* data;
  int64_t stride;  // elements from one row to the next
};

struct Fp32Matrix {
  float* data;
  int64_t stride;
};

// One panel of 64 columns of the result; `panel` counts them.
// out (m, n) = a (m, k) b (n, k)^T
void gemm_nt_panel(Bf16Matrix a, Bf16Matrix b, Fp32Matrix out, int64_t m, int64_t n, int64_t k,
                   int64_t panel, uint32_t* scratch);
// out (m, n) (+)= a (m, k) b (k, n)
void gemm_nn_panel(Bf16Matrix a, Bf16Matrix b, Fp32Matrix out, int64_t m, int64_t n, int64_t k,
                   bool add, int64_t panel, uint32_t* scratch);
// out (k, n) (+)= a (m, k)^T b (m, n), by blocks of TN_ROWS rows of the result; `packed` holds b
// as pack_tn_panel leaves it, ceil(n / 64) panels of ceil(m / 2) x 64, `out` is the block's own
void pack_tn_panel(Bf16Matrix b, int64_t m, int64_t n, int64_t panel, uint32_t* packed);
void gemm_tn_rows(Bf16Matrix a, const uint32_t* packed, Fp32Matrix out, int64_t m, int64_t n,
                  int64_t k, bool add, int64_t block, uint32_t* scratch);

// Rounded to nearest even.
void to_bf16(Fp32Matrix in, int64_t rows, int64_t columns, uint16_t* out, int64_t stride);

constexpr int64_t PANEL = 64;      // columns of the result per panel: four vectors
constexpr int64_t K_BLOCK = 512;   // a packed panel then takes 64 KiB
constexpr int64_t TN_ROWS = 48;
constexpr int64_t TN_PAIRS = 512;  // of m per sweep over a block: 128 KiB of a packed panel
constexpr int64_t PANEL_SCRATCH = K_BLOCK / 2 * PANEL;  // uint32 elements

}  // namespace es2fast
