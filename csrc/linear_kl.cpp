// The row pass of the linear KL on tensors; the kernel is in linear_kl_rows.inl.
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

namespace es2fast {
namespace {

// Where 16-bit results of `like`'s shape go; null when there is no place.
uint16_t* half_place(
    const std::optional<at::Tensor>& tensor, const at::Tensor& like, const char* name, int64_t* pitch) {
  if (!tensor.has_value()) return nullptr;
  check_matrix(*tensor, at::kBFloat16, name);
  TORCH_CHECK(
      tensor->sizes() == like.sizes(), name, ": expected ", like.sizes(), ", got ", tensor->sizes());
  *pitch = tensor->stride(0);
  return static_cast<uint16_t*>(tensor->mutable_data_ptr());
}

}  // namespace

at::Tensor kl_rows(
    const at::Tensor& teacher,
    const at::Tensor& student,
    const std::optional<at::Tensor>& bias_t,
    const std::optional<at::Tensor>& bias_s,
    const at::Tensor& scale,
    int64_t direction,
    double beta,
    double gain,
    double cap_in,
    double cap_out,
    bool is_delta,
    bool need_grad,
    const std::optional<at::Tensor>& half,
    const std::optional<at::Tensor>& low) {
  check_matrix(teacher, at::kFloat, "teacher");
  check_matrix(student, at::kFloat, "student");
  TORCH_CHECK(
      teacher.sizes() == student.sizes() && teacher.strides() == student.strides(),
      "teacher and student: expected one shape and one layout, got ", teacher.sizes(), " and ",
      student.sizes());
  TORCH_CHECK(direction >= 0 && direction <= 2, "direction: expected 0, 1 or 2, got ", direction);
  const int64_t rows = student.size(0), vocab = student.size(1);
  at::Tensor loss = at::empty({rows}, scale.options());
  KLRows q{};
  q.teacher = teacher.mutable_data_ptr<float>();
  q.student = student.mutable_data_ptr<float>();
  q.pitch = student.stride(0);
  q.vocab = vocab;
  q.bias_t = vector_of(bias_t, vocab, "bias_t");
  q.bias_s = vector_of(bias_s, vocab, "bias_s");
  q.scale = vector_of(scale, rows, "scale");
  q.loss = loss.mutable_data_ptr<float>();
  q.direction = static_cast<Direction>(direction);
  q.beta = static_cast<float>(beta);
  q.gain = static_cast<float>(gain);
  q.cap_in = static_cast<float>(cap_in);
  q.cap_out = static_cast<float>(cap_out);
  q.is_delta = is_delta;
  q.need_grad = need_grad;
  q.half = half_place(half, student, "half", &q.half_pitch);
  q.low = half_place(low, student, "low", &q.low_pitch);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { kernels().kl_rows(q, begin, end); });
  return loss;
}

}  // namespace es2fast
