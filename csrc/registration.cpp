// The native CPU operators: checks, choice of the instruction set, threads. Schemas are the contract
// with es2fast/ops/native.py, which registers what torch.compile needs to know of them.
#include "kernels.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace es2fast {
namespace {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef ES2FAST_X86
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kernels_avx512;
    if (capability == "AVX2") return kernels_avx2;
#endif
    return kernels_default;
  }();
  return chosen;
}

// A float32 CPU vector of n elements, contiguous.
const float* vector_of(const std::optional<at::Tensor>& tensor, int64_t n, const char* name) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK(
      tensor->device().is_cpu() && tensor->scalar_type() == at::kFloat && tensor->dim() == 1 &&
          tensor->size(0) == n && tensor->is_contiguous(),
      name, ": expected a contiguous float32 CPU vector of ", n, " elements, got ",
      tensor->toString(), tensor->sizes());
  return tensor->const_data_ptr<float>();
}

// A float32 CPU matrix whose rows are contiguous.
void check_matrix(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(
      tensor.device().is_cpu() && tensor.scalar_type() == at::kFloat && tensor.dim() == 2 &&
          (tensor.stride(1) == 1 || tensor.size(1) <= 1),
      name, ": expected a float32 CPU matrix with contiguous rows, got ", tensor.toString(),
      tensor.sizes());
}

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
    bool half_grad) {
  check_matrix(teacher, "teacher");
  check_matrix(student, "student");
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
  q.half_grad = half_grad;
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { kernels().kl_rows(q, begin, end); });
  return loss;
}

std::string capability() {
  return kernels().name;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(es2fast, m) {
  m.def("native_capability() -> str", &capability);
  m.def(
      "native_kl_rows(Tensor(a!) teacher, Tensor(b!) student, Tensor? bias_t, Tensor? bias_s, "
      "Tensor scale, int direction, float beta, float gain, float cap_in, float cap_out, "
      "bool is_delta, bool need_grad, bool half_grad) -> Tensor");
}

TORCH_LIBRARY_IMPL(es2fast, CPU, m) {
  m.impl("native_kl_rows", &kl_rows);
}

}  // namespace es2fast
