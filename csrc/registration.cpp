// The native CPU operators: their schemas, and the choice of the instruction set. What torch.compile
// needs to know of them is registered in es2fast/ops/native.py.
#include "ops.h"

#include <ATen/Version.h>
#include <torch/library.h>

namespace es2fast {

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

std::string capability() {
  return kernels().name;
}

const float* vector_of(const std::optional<at::Tensor>& tensor, int64_t n, const char* name) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK(
      tensor->device().is_cpu() && tensor->scalar_type() == at::kFloat && tensor->dim() == 1 &&
          tensor->size(0) == n && tensor->is_contiguous(),
      name, ": expected a contiguous float32 CPU vector of ", n, " elements, got ",
      tensor->toString(), tensor->sizes());
  return tensor->const_data_ptr<float>();
}

void check_matrix(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK(
      tensor.device().is_cpu() && tensor.scalar_type() == type && tensor.dim() == 2 &&
          (tensor.stride(1) == 1 || tensor.size(1) <= 1),
      name, ": expected a CPU matrix of ", type, " with contiguous rows, got ", tensor.toString(),
      tensor.sizes());
}

// What es2fast/ops/native.py asks for, changed with any operator's signature or meaning.
int64_t native_version() {
  return 1;
}

TORCH_LIBRARY_FRAGMENT(es2fast, m) {
  m.def("native_version() -> int", &native_version);
  m.def("native_capability() -> str", &capability);
  m.def("native_gemm_bf16() -> str", &gemm_bf16_name);
  m.def("native_dx_tasks(int m, int n, bool bf16, int threads) -> int", &dx_tasks);
  m.def("native_gemm_nt(Tensor a, Tensor b, Tensor(a!) out) -> ()");
  m.def("native_gemm_nn(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()");
  m.def("native_gemm_tn(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()");
  m.def(
      "native_kl_rows(Tensor(a!) teacher, Tensor(b!) student, Tensor? bias_t, Tensor? bias_s, "
      "Tensor scale, int direction, float beta, float gain, float cap_in, float cap_out, "
      "bool is_delta, bool need_grad, Tensor(c!)? half, Tensor(d!)? low) -> Tensor");
  m.def(
      "native_moment_rows(Tensor(a!) student, Tensor row_gain, Tensor? bias, float bias_gain, "
      "Tensor top_ids, Tensor top_probs, bool need_grad, bool half_grad) -> (Tensor, Tensor)");
  m.def(
      "native_pair_distances(Tensor(a!) tile, Tensor a_sq, Tensor b_sq, float close) -> Tensor");
  m.def(
      "native_pair_rows(Tensor(a!) tile, Tensor u, Tensor v, int kind, float margin, float scale, "
      "float log_floor, bool need_grad) -> Tensor");
  m.def(
      "native_few_pairs(Tensor a, Tensor b, Tensor u, Tensor v, int kind, float margin, float scale, "
      "float log_floor, bool need_da, bool need_db) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(es2fast, CPU, m) {
  m.impl("native_gemm_nt", &gemm_nt);
  m.impl("native_gemm_nn", &gemm_nn);
  m.impl("native_gemm_tn", &gemm_tn);
  m.impl("native_kl_rows", &kl_rows);
  m.impl("native_moment_rows", &moment_rows);
  m.impl("native_pair_distances", &pair_distances);
  m.impl("native_pair_rows", &pair_rows);
  m.impl("native_few_pairs", &few_pairs);
}

}  // namespace es2fast
