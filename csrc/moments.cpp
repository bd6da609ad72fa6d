// The row pass of the moment KL on tensors; the kernel is in moment_rows.inl.
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace es2fast {

std::tuple<at::Tensor, at::Tensor> moment_rows(
    const at::Tensor& student, const at::Tensor& row_gain, const std::optional<at::Tensor>& bias,
    double bias_gain, const at::Tensor& top_ids, const at::Tensor& top_probs, bool need_grad,
    bool half_grad) {
  check_matrix(student, at::kFloat, "student");
  const int64_t rows = student.size(0), vocab = student.size(1), anchors = top_ids.size(-1);
  for (const auto& [tensor, type, name] :
       {std::tuple(top_ids, at::kInt, "top_ids"), std::tuple(top_probs, at::kFloat, "top_probs")}) {
    check_matrix(tensor, type, name);
    TORCH_CHECK(
        tensor.size(0) == rows && tensor.size(1) == anchors && tensor.is_contiguous(), name,
        ": expected ", rows, " x ", anchors, ", contiguous, got ", tensor.sizes());
  }
  const int32_t* ids = top_ids.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < rows * anchors; ++i) {
    TORCH_CHECK(ids[i] >= 0 && ids[i] < vocab, "top_ids: ", ids[i], " is no token of ", vocab);
  }
  at::Tensor row_max = at::empty({rows}, row_gain.options());
  at::Tensor row_sum = at::empty({rows}, row_gain.options());
  at::Tensor anchor_grad = at::empty_like(top_probs);
  MomentRows q{};
  q.student = student.mutable_data_ptr<float>();
  q.pitch = student.stride(0);
  q.vocab = vocab;
  q.row_gain = vector_of(row_gain, rows, "row_gain");
  q.bias = vector_of(bias, vocab, "bias");
  q.bias_gain = static_cast<float>(bias_gain);
  q.top_ids = ids;
  q.top_probs = top_probs.const_data_ptr<float>();
  q.anchors = anchors;
  q.anchor_grad = anchor_grad.mutable_data_ptr<float>();
  q.row_max = row_max.mutable_data_ptr<float>();
  q.row_sum = row_sum.mutable_data_ptr<float>();
  q.need_grad = need_grad;
  q.half_grad = half_grad;
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    kernels().moment_rows(q, begin, end);
  });
  return {row_max, row_sum};
}

}  // namespace es2fast
