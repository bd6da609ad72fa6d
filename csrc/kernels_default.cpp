// The kernels for the instruction set DEFAULT; setup.py compiles this file with its flags.
#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT
#include "linear_kl_rows.inl"
#include "moment_rows.inl"
#include "pair_rows.inl"

namespace es2fast {
const Kernels kernels_default = {"DEFAULT",
    kl_rows, moment_rows, pair_rows, few_losses, few_gradients, pair_distances_row};
}  // namespace es2fast
