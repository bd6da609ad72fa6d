// The distances and the pair pass of the separation losses on tensors; kernels: pair_rows.inl.
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

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

namespace {

// `values` (n,) takes the losses of the rows of `tile` (n, m).
PairRows pairs_of(
    const at::Tensor& tile, const at::Tensor& u, const at::Tensor& v, const at::Tensor& values,
    int64_t kind, double margin, double scale, double log_floor, bool need_grad) {
  check_matrix(tile, at::kFloat, "tile");
  TORCH_CHECK(kind >= 0 && kind <= 5, "kind: expected 0 to 5, got ", kind);
  const int64_t rows = tile.size(0), columns = tile.size(1);
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
  return q;
}

}  // namespace

at::Tensor pair_rows(
    const at::Tensor& tile, const at::Tensor& u, const at::Tensor& v, int64_t kind, double margin,
    double scale, double log_floor, bool need_grad) {
  at::Tensor values = at::empty({tile.size(0)}, u.options());
  const PairRows q = pairs_of(tile, u, v, values, kind, margin, scale, log_floor, need_grad);
  at::parallel_for(0, tile.size(0), grain(q.columns), [&](int64_t begin, int64_t end) {
    kernels().pair_rows(q, begin, end);
  });
  return values;
}

// (losses of the rows of a (n,), da (n, H), db (m, H)); a gradient not asked for is empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> few_pairs(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& u, const at::Tensor& v, int64_t kind,
    double margin, double scale, double log_floor, bool need_da, bool need_db) {
  TORCH_CHECK(
      a.device().is_cpu() && b.device().is_cpu() && a.dim() == 2 && b.dim() == 2 &&
          a.size(1) == b.size(1),
      "a and b: expected CPU matrices of one width, got ", a.sizes(), " and ", b.sizes());
  TORCH_CHECK(b.size(0) <= FEW_ROWS, "b: at most ", FEW_ROWS, " rows, got ", b.size(0));
  const at::Tensor rows_a = a.to(at::kFloat).contiguous(), rows_b = b.to(at::kFloat).contiguous();
  const int64_t n = a.size(0), m = b.size(0), width = a.size(1);
  at::Tensor tile = at::empty({n, m}, rows_a.options()), values = at::empty({n}, u.options());
  at::Tensor da = at::zeros({need_da ? n : 0, width}, rows_a.options());
  at::Tensor db = at::zeros({need_db ? m : 0, width}, rows_a.options());
  FewPairs q{};
  q.a = rows_a.const_data_ptr<float>();
  q.b = rows_b.const_data_ptr<float>();
  q.n = n, q.m = m, q.width = width;
  q.pairs = pairs_of(tile, u, v, values, kind, margin, scale, log_floor, need_da || need_db);
  q.da = need_da ? da.mutable_data_ptr<float>() : nullptr;
  q.db = need_db ? db.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, n, grain(m * width), [&](int64_t begin, int64_t end) {
    kernels().few_losses(q, begin, end);
  });
  if (need_da || need_db) {
    const int64_t blocks = (width + FEW_COLUMNS - 1) / FEW_COLUMNS;
    at::parallel_for(0, blocks, grain(n * m * FEW_COLUMNS), [&](int64_t begin, int64_t end) {
      kernels().few_gradients(q, begin, end);
    });
  }
  return {values, da, db};
}

}  // namespace es2fast
