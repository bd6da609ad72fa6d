// Row pass of the moment KL: formulas and names as in es2fast/ops/moments/chunked.py.
//
// One sweep turns raw logits into z and gives the row's maximum and sum of exponentials, block by
// block, merged in double; a second one writes G = p_s over them, with the teacher's probability
// subtracted at the anchors before anything is rounded.
#include "kernels.h"
#include "vec_math.h"

#include <c10/util/BFloat16.h>

#include <algorithm>

namespace es2fast {
inline namespace CPU_CAPABILITY {

constexpr int64_t MOMENT_BLOCK = 512;

void moment_row(const MomentRows& q, int64_t row) {
  float* z = q.student + row * q.pitch;
  const Vec gain(q.row_gain[row]);
  double m = NEG_INF, p = 0;
  for (int64_t begin = 0; begin < q.vocab; begin += MOMENT_BLOCK) {
    const int64_t end = std::min(begin + MOMENT_BLOCK, q.vocab);
    Vec top(NEG_INF), p_v(0.0f);
    for_vectors(begin, end, [&](int64_t j, int64_t n) {
      Vec x = load(z + j, n) * gain;
      if (q.bias) x = at::vec::fmadd(load(q.bias + j, n), Vec(q.bias_gain), x);
      store(z + j, x, n);
      top = at::vec::maximum(top, only(x, NEG_INF, n));
    });
    const float m_b = max(top);
    if (m_b == NEG_INF) continue;  // no token of this block is possible
    for_vectors(begin, end, [&](int64_t j, int64_t n) {
      p_v = p_v + only(vexp(load(z + j, n) - Vec(m_b)), 0.0f, n);
    });
    const double p_b = sum(p_v), new_top = std::max<double>(m, m_b);
    p = (p == 0 ? 0 : p * std::exp(m - new_top)) + p_b * std::exp(m_b - new_top);
    m = new_top;
  }
  q.row_max[row] = static_cast<float>(m);
  q.row_sum[row] = static_cast<float>(p);
  if (!q.need_grad) return;
  const Vec m_v(static_cast<float>(m)), inv_p(static_cast<float>(1 / p));
  float* anchors = q.anchor_grad + row * q.anchors;  // z is gone once G is written
  const int32_t* ids = q.top_ids + row * q.anchors;
  for (int64_t k = 0; k < q.anchors; ++k) {
    anchors[k] = static_cast<float>(std::exp(z[ids[k]] - m) / p - q.top_probs[row * q.anchors + k]);
  }
  auto* half = reinterpret_cast<c10::BFloat16*>(z);
  for_vectors(0, q.vocab, [&](int64_t j, int64_t n) {
    const Vec g = vexp(load(z + j, n) - m_v) * inv_p;
    if (q.half_grad) {  // trails what is still to be read of this row
      at::vec::convert_from_float<c10::BFloat16>(g, g).store(half + j, static_cast<int>(n));
    } else {
      store(z + j, g, n);
    }
  });
  for (int64_t k = 0; k < q.anchors; ++k) {
    if (q.half_grad) {
      half[ids[k]] = c10::BFloat16(anchors[k]);
    } else {
      z[ids[k]] = anchors[k];
    }
  }
}

void moment_rows(const MomentRows& q, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) moment_row(q, row);
}

}  // namespace CPU_CAPABILITY
}  // namespace es2fast
