// The blocking of the bfloat16 GEMMs, the same for all instruction sets. A Kernel has
//
//   K_GROUP, TN_ROWS   k_group and tn_rows of its table
//   TN_PAIRS           pairs of m per sweep over a block of the tn product
//   pack_rows(b, rows, k, out)        b (rows, k) with rows <= PANEL -> a packed panel of columns
//   pack_columns(b, columns, k, out)  b (k, columns) -> the same panel
//   pack_left(a, rows, k, out)        a (k, rows) with rows <= TN_ROWS -> a packed left operand
//   to_bf16                           of its table
//   multiply(a, b, k, out, rows, columns, add)  out (rows, columns) (+)= a (rows, k) b, b packed
//   multiply_packed(a, b, pairs, out, rows, columns, add)  the same with a packed
//
// Packed operands hold K_GROUP elements of k side by side, zeros where there is no element: K_GROUP
// elements of all PANEL columns (TN_ROWS rows), then the next. So a pair of k takes PANEL (TN_ROWS)
// uint32 in all of them. A Kernel is made per call; AMX keeps its tiles configured in it.
#include "gemm_bf16.h"

#include <algorithm>

namespace es2fast {
namespace {

template <typename Kernel>
int64_t padded_pairs(int64_t k) {
  return (k + Kernel::K_GROUP - 1) / Kernel::K_GROUP * Kernel::K_GROUP / 2;
}

template <typename Kernel>
void nt_panel(Bf16Matrix a, Bf16Matrix b, Fp32Matrix out, int64_t m, int64_t n, int64_t k,
              int64_t panel, uint32_t* scratch) {
  Kernel kernel;
  const int64_t first = panel * PANEL, columns = std::min(PANEL, n - first);
  for (int64_t at = 0; at < k; at += K_BLOCK) {
    const int64_t size = std::min(K_BLOCK, k - at);
    Kernel::pack_rows({b.data + first * b.stride + at, b.stride}, columns, size, scratch);
    kernel.multiply({a.data + at, a.stride}, scratch, size, {out.data + first, out.stride}, m, columns,
                    at > 0);
  }
}

template <typename Kernel>
void nn_panel(Bf16Matrix a, Bf16Matrix b, Fp32Matrix out, int64_t m, int64_t n, int64_t k, bool add,
              int64_t panel, uint32_t* scratch) {
  Kernel kernel;
  const int64_t first = panel * PANEL, columns = std::min(PANEL, n - first);
  for (int64_t at = 0; at < k; at += K_BLOCK) {
    const int64_t size = std::min(K_BLOCK, k - at);
    Kernel::pack_columns({b.data + at * b.stride + first, b.stride}, columns, size, scratch);
    kernel.multiply({a.data + at, a.stride}, scratch, size, {out.data + first, out.stride}, m, columns,
                    add || at > 0);
  }
}

template <typename Kernel>
void pack_tn_panel(Bf16Matrix b, int64_t m, int64_t n, int64_t panel, uint32_t* packed) {
  const int64_t first = panel * PANEL;
  Kernel::pack_columns({b.data + first, b.stride}, std::min(PANEL, n - first), m,
                       packed + panel * padded_pairs<Kernel>(m) * PANEL);
}

template <typename Kernel>
void tn_block(Bf16Matrix a, const uint32_t* packed, Fp32Matrix out, int64_t m, int64_t n, int64_t k,
              bool add, int64_t block, uint32_t* scratch) {
  Kernel kernel;
  const int64_t first = block * Kernel::TN_ROWS, rows = std::min(Kernel::TN_ROWS, k - first);
  const int64_t pairs = padded_pairs<Kernel>(m);
  Kernel::pack_left({a.data + first, a.stride}, rows, m, scratch);
  for (int64_t at = 0; at < pairs; at += Kernel::TN_PAIRS) {
    const int64_t some = std::min(Kernel::TN_PAIRS, pairs - at);
    for (int64_t j = 0; j < n; j += PANEL) {
      kernel.multiply_packed(scratch + at * Kernel::TN_ROWS, packed + (j / PANEL * pairs + at) * PANEL,
                             some, {out.data + j, out.stride}, rows, std::min(PANEL, n - j),
                             add || at > 0);
    }
  }
}

template <typename Kernel>
constexpr Bf16Gemm table_of(const char* name) {
  return {name, Kernel::K_GROUP, Kernel::TN_ROWS, nt_panel<Kernel>, nn_panel<Kernel>,
          pack_tn_panel<Kernel>, tn_block<Kernel>, Kernel::to_bf16};
}

}  // namespace
}  // namespace es2fast
