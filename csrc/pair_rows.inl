// Pair pass of the separation losses: formulas and names as in es2fast/ops/separation_chunked.py.
//
// One sweep over a row of squared distances gives its loss and, in their place, the coefficients
// c_ij = u_i v_j f'(d_ij) / d_ij of the gradient's GEMMs; 0 where d = 0.
#include "kernels.h"
#include "vec_math.h"

#include <algorithm>

namespace es2fast {
inline namespace CPU_CAPABILITY {

constexpr int64_t PAIR_BLOCK = 512;

struct PairTerms {
  Vec value, quotient;  // f(d), f'(d) / d
};

template <PairKind K>
inline PairTerms pair_terms(const Vec& d2, const PairRows& q) {
  const Vec zero(0.0f), one(1.0f);
  if constexpr (K == PairKind::squared || K == PairKind::cosine) {
    const bool squared = K == PairKind::squared;
    const float factor = squared ? 1.0f / (q.scale * q.scale) : 1.0f;
    const Vec rest = Vec(q.start) - (squared ? d2 : d2 * Vec(0.5f));
    const Vec slope = Vec::blendv(zero, Vec(squared ? -2 * factor : -1.0f), rest > zero);
    return {at::vec::maximum(rest, zero) * Vec(factor), slope};
  }
  const Vec d = d2.sqrt();
  if constexpr (K == PairKind::log) {
    const Vec floor(q.log_floor * q.scale);
    const Vec value = (at::vec::maximum(d, floor) / Vec(q.scale)).log().neg();
    return {value, Vec::blendv(zero, Vec(-1.0f) / d2, d > floor)};
  }
  const Vec inverse = Vec::blendv(zero, Vec(-1.0f) / (Vec(q.scale) * d), d2 > zero);
  if constexpr (K == PairKind::l2) return {d * Vec(-1.0f / q.scale), inverse};
  const Vec rest = (Vec(q.margin) - d) / Vec(q.scale), positive = at::vec::maximum(rest, zero);
  if constexpr (K == PairKind::hinge) {
    return {positive, Vec::blendv(zero, inverse, rest > zero)};
  }
  const Vec e = vexp(rest.abs().neg());  // softplus, its derivative the sigmoid
  const Vec sigmoid = Vec::blendv(e, one, rest > zero) / (one + e);
  return {positive + e.log1p(), inverse * sigmoid};
}

template <PairKind K>
float pair_row(const PairRows& q, int64_t row) {
  float* tile = q.tile + row * q.pitch;
  const Vec u(q.u[row]);
  double loss = 0;
  for (int64_t begin = 0; begin < q.columns; begin += PAIR_BLOCK) {
    Vec loss_v(0.0f);
    for_vectors(begin, std::min(begin + PAIR_BLOCK, q.columns), [&](int64_t j, int64_t n) {
      const Vec d2 = at::vec::maximum(load(tile + j, n), Vec(0.0f)), v = only(load(q.v + j, n), 0.0f, n);
      const PairTerms t = pair_terms<K>(d2, q);
      loss_v = at::vec::fmadd(v, only(t.value, 0.0f, n), loss_v);
      if (q.need_grad) store(tile + j, t.quotient * v * u, n);
    });
    loss += sum(loss_v);
  }
  return static_cast<float>(loss * q.u[row]);
}

// Gram row -> squared distances in place; the columns of the close pairs, in order. Returns how many.
int64_t pair_distances_row(const PairDistances& q, int64_t row, int32_t* close) {
  float* tile = q.tile + row * q.pitch;
  const Vec a(q.a_sq[row]), bound(q.close);
  int64_t found = 0;
  for_vectors(0, q.columns, [&](int64_t j, int64_t n) {
    const Vec sizes = a + load(q.b_sq + j, n), gram = load(tile + j, n);
    const Vec d2 = at::vec::maximum(at::vec::fmadd(gram, Vec(-2.0f), sizes), Vec(0.0f));
    store(tile + j, d2, n);
    const Vec far = only(d2 >= sizes * bound, 1.0f, n);
    if (!all(far)) {
      float flags[W];
      far.store(flags);
      for (int64_t i = 0; i < n; ++i) {
        if (flags[i] == 0.0f) close[found++] = static_cast<int32_t>(j + i);
      }
    }
  });
  return found;
}

void pair_rows(const PairRows& q, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    switch (q.kind) {
      case PairKind::hinge: q.values[row] = pair_row<PairKind::hinge>(q, row); break;
      case PairKind::l2: q.values[row] = pair_row<PairKind::l2>(q, row); break;
      case PairKind::log: q.values[row] = pair_row<PairKind::log>(q, row); break;
      case PairKind::softplus: q.values[row] = pair_row<PairKind::softplus>(q, row); break;
      case PairKind::squared: q.values[row] = pair_row<PairKind::squared>(q, row); break;
      case PairKind::cosine: q.values[row] = pair_row<PairKind::cosine>(q, row); break;
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace es2fast
