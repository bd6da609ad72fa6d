// The pair pass of the separation losses on tensors; the kernel is in pair_rows.inl.
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

namespace es2fast {

at::Tensor pair_rows(
    const at::Tensor& tile, const at::Tensor& u, const at::Tensor& v, int64_t kind, double margin,
    double scale, double log_floor, bool need_grad) {
  check_matrix(tile, at::kFloat, "tile");
  TORCH_CHECK(kind >= 0 && kind <= 5, "kind: expected 0 to 5, got ", kind);
  const int64_t rows = tile.size(0), columns = tile.size(1);
  at::Tensor values = at::empty({rows}, u.options());
  PairRows q{};
  q.tile = tile.mutable_data_ptr<float>();
  q.pitch = tile.stride(0);
  q.columns = columns;
  q.u = vector_of(u, rows, "u");
  q.v = vector_of(v, columns, "v");
  q.values = values.mutable_data_ptr<float>();
  q.kind = static_cast<PairKind>(kind);
  q.margin = static_cast<float>(margin);
  q.scale = static_cast<float>(scale);
  q.log_floor = static_cast<float>(log_floor);
  q.need_grad = need_grad;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    kernels().pair_rows(q, begin, end);
  });
  return values;
}

}  // namespace es2fast
