// Pair pass of the separation losses: formulas and names as in es2fast/ops/separation/chunked.py.
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

// Squared distances of A rows to R others: A R sums in flight hide the adder's latency, and every row
// of b is read once for A rows of a.
template <int A, int R>
inline void few_distances(const FewPairs& q, int64_t i, int64_t j) {
  Vec sums[A][R];
  for (auto& row : sums) {
    for (auto& x : row) x = Vec(0.0f);
  }
  for_vectors(0, q.width, [&](int64_t k, int64_t n) {
    Vec b[R];
    for (int r = 0; r < R; ++r) b[r] = load(q.b + (j + r) * q.width + k, n);
    for (int l = 0; l < A; ++l) {
      const Vec a = load(q.a + (i + l) * q.width + k, n);
      for (int r = 0; r < R; ++r) {
        const Vec d = only(a - b[r], 0.0f, n);
        sums[l][r] = at::vec::fmadd(d, d, sums[l][r]);
      }
    }
  });
  for (int l = 0; l < A; ++l) {
    for (int r = 0; r < R; ++r) q.pairs.tile[(i + l) * q.pairs.pitch + j + r] = sum(sums[l][r]);
  }
}

template <int A>
inline void few_distances_of(const FewPairs& q, int64_t i) {
  int64_t j = 0;
  for (; j + 4 <= q.m; j += 4) few_distances<A, 4>(q, i, j);
  for (; j < q.m; ++j) few_distances<A, 1>(q, i, j);
}

// Squared distances of rows of a to all of b, then their losses and coefficients.
void few_losses(const FewPairs& q, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) few_distances_of<4>(q, i);
  for (; i < end; ++i) few_distances_of<1>(q, i);
  for (i = begin; i < end; ++i) {
    for (int64_t j = 0; j < q.m; ++j) {  // a row of weight 0 may hold NaN
      if (q.pairs.u[i] == 0 || q.pairs.v[j] == 0) q.pairs.tile[i * q.pairs.pitch + j] = 0;
    }
  }
  pair_rows(q.pairs, begin, end);
}

// da_i += c_ij (a_i - b_j), db_j -= the same, by blocks of columns: one owner per element. The block
// of b is copied, since rows a power of two apart would evict each other from the cache.
void few_gradients(const FewPairs& q, int64_t begin, int64_t end) {
  constexpr int64_t VECTORS = FEW_COLUMNS / W;
  alignas(64) float b[FEW_ROWS * FEW_COLUMNS], db[FEW_ROWS * FEW_COLUMNS];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * FEW_COLUMNS, columns = std::min(FEW_COLUMNS, q.width - first);
    for (int64_t j = 0; j < q.m; ++j) {
      for (int64_t k = 0; k < FEW_COLUMNS; ++k) {
        b[j * FEW_COLUMNS + k] = k < columns ? q.b[j * q.width + first + k] : 0.0f;
        db[j * FEW_COLUMNS + k] = 0;
      }
    }
    for (int64_t i = 0; i < q.n; ++i) {
      const float* c = q.pairs.tile + i * q.pairs.pitch;
      Vec a[VECTORS], da[VECTORS];
      for (int64_t k = 0; k < VECTORS; ++k) {
        const int64_t left = std::clamp<int64_t>(columns - k * W, 0, W);
        a[k] = left ? only(load(q.a + i * q.width + first + k * W, left), 0.0f, left) : Vec(0.0f);
        da[k] = Vec(0.0f);
      }
      for (int64_t j = 0; j < q.m; ++j) {
        if (c[j] == 0) continue;
        const Vec factor(c[j]);
        for (int64_t k = 0; k < VECTORS; ++k) {
          const Vec d = a[k] - Vec::loadu(b + j * FEW_COLUMNS + k * W);
          float* out = db + j * FEW_COLUMNS + k * W;
          da[k] = at::vec::fmadd(factor, d, da[k]);
          at::vec::fmadd(factor.neg(), d, Vec::loadu(out)).store(out);
        }
      }
      for (int64_t k = 0; q.da && k < VECTORS; ++k) {
        const int64_t left = std::clamp<int64_t>(columns - k * W, 0, W);
        if (left) store(q.da + i * q.width + first + k * W, da[k], left);
      }
    }
    for (int64_t j = 0; q.db && j < q.m; ++j) {
      for (int64_t k = 0; k < columns; ++k) q.db[j * q.width + first + k] = db[j * FEW_COLUMNS + k];
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace es2fast
