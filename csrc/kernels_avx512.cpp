// The kernels for the instruction set AVX512; setup.py compiles this file with its flags.
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#include "linear_kl_rows.inl"
#include "moment_rows.inl"
#include "pair_rows.inl"

namespace es2fast {
const Kernels kernels_avx512 = {"AVX512",
    kl_rows, moment_rows, pair_rows, few_losses, few_gradients, pair_distances_row};
}  // namespace es2fast
