// The distances and the pair pass of the separation losses on tensors; kernels: pair_rows.inl.
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

namespace es2fast {

namespace {

// Rows per task, so that a task is worth a thread.
int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
}

}  // namespace

// Products a.b -> squared distances in place; (2, K) row and column of the close pairs, in order.
at::Tensor pair_distances(
    const at::Tensor& tile, const at::Tensor& a_sq, const at::Tensor& b_sq, double close) {
  check_matrix(tile, at::kFloat, "tile");
  const int64_t rows = tile.size(0), columns = tile.size(1);
  PairDistances q{};
  q.tile = tile.mutable_data_ptr<float>();
  q.pitch = tile.stride(0);
  q.columns = columns;
  q.a_sq = vector_of(a_sq, rows, "a_sq");
  q.b_sq = vector_of(b_sq, columns, "b_sq");
  q.close = static_cast<float>(close);
  std::vector<std::vector<int32_t>> found(rows);
  at::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> scratch(columns);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t count = kernels().pair_distances_row(q, row, scratch.data());
      found[row].assign(scratch.begin(), scratch.begin() + count);
    }
  });
  int64_t total = 0;
  for (const auto& columns_of_row : found) total += static_cast<int64_t>(columns_of_row.size());
  at::Tensor index = at::empty({2, total}, tile.options().dtype(at::kLong));
  int64_t* i = index.mutable_data_ptr<int64_t>();
  int64_t* j = i + total;
  for (int64_t row = 0; row < rows; ++row) {
    for (const int32_t column : found[row]) *i++ = row, *j++ = column;
  }
  return index;
}

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
  q.start = static_cast<float>(q.kind == PairKind::squared ? margin * margin : 1 - margin);
  q.log_floor = static_cast<float>(log_floor);
  q.need_grad = need_grad;
  at::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    kernels().pair_rows(q, begin, end);
  });
  return values;
}

}  // namespace es2fast
