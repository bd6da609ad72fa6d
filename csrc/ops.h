// The operators on tensors, and the checks that they share.
#pragma once

#include "kernels.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace es2fast {

// The kernels for the instruction set that torch itself uses here.
const Kernels& kernels();
std::string capability();

// A contiguous float32 CPU vector of n elements, or null when there is none.
const float* vector_of(const std::optional<at::Tensor>& tensor, int64_t n, const char* name);
// Throws unless `tensor` is a CPU matrix of this type whose rows are contiguous.
void check_matrix(const at::Tensor& tensor, at::ScalarType type, const char* name);

// linear_kl.cpp
at::Tensor kl_rows(
    const at::Tensor& teacher, const at::Tensor& student, const std::optional<at::Tensor>& bias_t,
    const std::optional<at::Tensor>& bias_s, const at::Tensor& scale, int64_t direction, double beta,
    double gain, double cap_in, double cap_out, bool is_delta, bool need_grad,
    const std::optional<at::Tensor>& half, const std::optional<at::Tensor>& low);

// moments.cpp
std::tuple<at::Tensor, at::Tensor> moment_rows(
    const at::Tensor& student, const at::Tensor& row_gain, const std::optional<at::Tensor>& bias,
    double bias_gain, const at::Tensor& top_ids, const at::Tensor& top_probs, bool need_grad,
    bool half_grad);

// separation.cpp
at::Tensor pair_distances(
    const at::Tensor& tile, const at::Tensor& a_sq, const at::Tensor& b_sq, double close);
std::tuple<at::Tensor, at::Tensor, at::Tensor> few_pairs(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& u, const at::Tensor& v, int64_t kind,
    double margin, double scale, double log_floor, bool need_da, bool need_db);
at::Tensor pair_rows(
    const at::Tensor& tile, const at::Tensor& u, const at::Tensor& v, int64_t kind, double margin,
    double scale, double log_floor, bool need_grad);

// gemm.cpp: float32 results of float32, bfloat16 or float16 inputs; of gemm_tn without `add` also
// bfloat16, rounded once
// The instruction set of our own bfloat16 GEMMs here, or "" where there are none.
std::string gemm_bf16_name();
// Tasks that gemm_nn's result (m, n) is cut into for a number of threads.
int64_t dx_tasks(int64_t m, int64_t n, bool bf16, int64_t threads);
void gemm_nt(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out);
void gemm_nn(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add);
void gemm_tn(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add);

}  // namespace es2fast
