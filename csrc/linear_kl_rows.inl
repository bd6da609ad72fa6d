// Row pass of the linear KL: formulas and names as in es2fast/ops/linear_kl/rows.py.
//
// A row is swept once for its statistics, in blocks that stay in the first-level cache, and once for
// the gradient; JSD, whose value needs normalised rows, once more. With z the base's logits and d
// the other side's minus the base's, a block gives its maximum m, p = sum e^(z-m), the centre
// c = E[d] and s = sum e^(z-m) phi(d - c), phi(u) = e^u - 1 - u >= 0; blocks are merged in double.
// KL = log1p(s/p) then has no cancellation however close the two models are.
#include "kernels.h"
#include "vec_math.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace es2fast {
inline namespace CPU_CAPABILITY {

constexpr int64_t BLOCK = 512;
constexpr float SERIES_BELOW = 0.5f;
constexpr double LARGEST_EXP = 700;  // of a double's exponential, nearly

// A double constant as two floats, so that d - x keeps d's precision when x is large.
struct Split {
  float high, low;
  explicit Split(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - high)) {}
  Vec from(const Vec& d) const { return (d - Vec(high)) - Vec(low); }
};

struct RowStatistics {
  double m = NEG_INF, p = 0, c = 0, s = 0;

  void merge(double m_b, double p_b, double c_b, double s_b) {
    const double top = std::max(m, m_b);
    const double mine = m == top ? 1.0 : std::exp(m - top);
    const double theirs = m_b == top ? 1.0 : std::exp(m_b - top);
    const double p_0 = p * mine, p_1 = p_b * theirs, total = p_0 + p_1;
    const double centre = p_0 == 0 ? c_b : c + (c_b - c) * (p_1 / total);
    // A part whose weight is 0 beside the other's may be where all of the other side's is: s is
    // infinite then, which has `direct` called.
    const auto moved = [centre](double s_i, double p_i, double c_i, bool possible) {
      const double k = c_i - centre;
      if (p_i == 0) return possible && k > LARGEST_EXP ? HUGE_VAL : 0.0;
      return s_i * std::exp(k) + p_i * (std::expm1(k) - k);
    };
    s = moved(s * mine, p_0, c, p > 0) + moved(s_b * theirs, p_1, c_b, p_b > 0);
    m = top, p = total, c = centre;
  }
};

template <Direction D>
struct RowPass {
  const KLRows& q;
  float* z;  // teacher's raw logits, then the base's z
  float* d;  // student's raw logits or delta, then z_other - z_base
  float scale;
  c10::BFloat16 *half, *low;
  RowStatistics st;

  RowPass(const KLRows& rows, int64_t row)
      : q(rows), z(rows.teacher + row * rows.pitch), d(rows.student + row * rows.pitch),
        scale(rows.scale[row]), half(place(rows.half, row * rows.half_pitch)),
        low(place(rows.low, row * rows.low_pitch)) {}

  static c10::BFloat16* place(uint16_t* first, int64_t offset) {
    return first ? reinterpret_cast<c10::BFloat16*>(first + offset) : nullptr;
  }

  // Raw logits -> (z, d) in place.
  void transform(int64_t j, int64_t n) {
    Vec t = load(z + j, n), x = load(d + j, n);
    if (q.bias_t) t = t + load(q.bias_t + j, n);
    if (q.bias_s) x = x + load(q.bias_s + j, n);
    if (!q.is_delta) x = x - t;
    if (q.cap_in == 0) {
      t = t * Vec(q.gain);
      x = x * Vec(q.gain);
    } else {  // tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
      t = t * Vec(q.cap_in);
      x = x * Vec(q.cap_in);
      const Vec tanh_t = t.tanh(), tanh_s = (t + x).tanh();
      x = x.tanh() * (Vec(1.0f) - tanh_s * tanh_t) * Vec(q.cap_out);
      t = tanh_t * Vec(q.cap_out);
    }
    if constexpr (D == Direction::reverse) {
      t = t + x;
      x = x.neg();
    }
    store(z + j, t, n);
    store(d + j, x, n);
  }

  // `values` where `keys` is `key`: d where most of the block's weight is, be it 128 elsewhere.
  static float lane_of(float key, const Vec& keys, const Vec& values) {
    float k[Vec::size()], v[Vec::size()];
    keys.store(k), values.store(v);
    for (int i = 0; i < Vec::size(); ++i) {
      if (k[i] == key) return v[i];
    }
    return 0.0f;
  }

  void fold(int64_t begin, int64_t end) {
    float e[BLOCK];
    Vec top(NEG_INF), at_top(0.0f);  // of each lane
    for_vectors(begin, end, [&](int64_t j, int64_t n) {
      transform(j, n);
      const Vec z_j = only(load(z + j, n), NEG_INF, n);
      at_top = Vec::blendv(at_top, load(d + j, n), z_j > top);
      top = at::vec::maximum(top, z_j);
    });
    const float m_b = max(top);
    if (m_b == NEG_INF) return;  // no token of this block is possible
    const float first = lane_of(m_b, top, at_top);  // keeps a common offset out of the rounding
    Vec p_v(0.0f), d_v(0.0f);
    for_vectors(begin, end, [&](int64_t j, int64_t n) {
      const Vec w = only(vexp(load(z + j, n) - Vec(m_b)), 0.0f, n);
      store(e + j - begin, w, n);
      p_v = p_v + w;
      d_v = at::vec::fmadd(w, load(d + j, n) - Vec(first), d_v);
    });
    const double p_b = sum(p_v), c_b = first + sum(d_v) / p_b;
    const Vec centre(static_cast<float>(c_b));
    Vec s_v(0.0f);
    for_vectors(begin, end, [&](int64_t j, int64_t n) {
      const Vec w = only(load(e + j - begin, n), 0.0f, n);
      const Vec u = only(load(d + j, n) - centre, 0.0f, n), near = u.abs() <= Vec(SERIES_BELOW);
      Vec term = w * vphi(clip(u, SERIES_BELOW));
      if (!all(near)) {
        const Vec ratio = only(vexp(load(z + j, n) - Vec(m_b) + u), 0.0f, n);
        term = Vec::blendv(ratio - w * (Vec(1.0f) + u), term, near);
      }
      s_v = s_v + term;
    });
    st.merge(m_b, p_b, c_b, sum(s_v));
  }

  // KL from the two logsumexps, for when s overflows: far apart, where nothing cancels.
  double direct() const {
    Vec top(NEG_INF);
    for_vectors(0, q.vocab, [&](int64_t j, int64_t n) {
      top = at::vec::maximum(top, only(load(z + j, n) + load(d + j, n), NEG_INF, n));
    });
    const float m_o = max(top);
    double p_o = 0;
    for (int64_t begin = 0; begin < q.vocab; begin += BLOCK) {
      Vec p_v(0.0f);
      for_vectors(begin, std::min(begin + BLOCK, q.vocab), [&](int64_t j, int64_t n) {
        p_v = p_v + only(vexp(load(z + j, n) + load(d + j, n) - Vec(m_o)), 0.0f, n);
      });
      p_o += sum(p_v);
    }
    return m_o + std::log(p_o) - (st.m + std::log(st.p)) - st.c;
  }

  // dz_s/draw_s of the columns from j on.
  Vec slope(const Vec& z_b, const Vec& diff) const {
    if (q.cap_in == 0) return Vec(q.gain);
    const Vec tanh_s = (D == Direction::reverse ? z_b : z_b + diff) / Vec(q.cap_out);
    return (Vec(1.0f) - tanh_s * tanh_s) * Vec(q.gain);
  }

  // 16-bit G trails what is still to be read of this row, should it be in the same memory.
  void put(int64_t j, const Vec& g, int64_t n) {
    if (!half) {
      store(d + j, g, n);
      return;
    }
    const auto high = at::vec::convert_from_float<c10::BFloat16>(g, g);
    high.store(half + j, static_cast<int>(n));
    if (low) {
      const Vec rest = g - std::get<0>(at::vec::convert_to_float<c10::BFloat16>(high));
      at::vec::convert_from_float<c10::BFloat16>(rest, rest).store(low + j, static_cast<int>(n));
    }
  }

  // KL(t||s) and KL(s||t).
  void gradient(double kl) {
    const Split shift(D == Direction::forward ? st.c + kl : st.c);
    const Vec m(static_cast<float>(st.m)), inv_p(static_cast<float>(1.0 / st.p)), factor(scale);
    for_vectors(0, q.vocab, [&](int64_t j, int64_t n) {
      const Vec z_b = load(z + j, n), diff = load(d + j, n), r = shift.from(diff);
      const Vec p_b = vexp(z_b - m) * inv_p;
      Vec g;
      if constexpr (D == Direction::reverse) {
        g = p_b.neg() * r;
      } else {
        const Vec near = r.abs() <= Vec(SERIES_BELOW), clipped = clip(r, SERIES_BELOW);
        g = p_b * (clipped + vphi(clipped));
        if (!all(near)) g = Vec::blendv(vexp(z_b - m + r) * inv_p - p_b, g, near);
      }
      put(j, g * slope(z_b, diff) * factor, n);
    });
  }

  struct JSDTerms {
    Vec value, p_s, log_sm;  // value's term; p_s; log(p_s / m)
  };

  // sum_k (-w)^k (a - a^k) / (k (k-1)): the value's term over p_t for small w = p_s/p_t - 1.
  static Vec jsd_series(const Vec& w, float a) {
    Vec series(0.0f);
    for (int k = 8; k >= 2; --k) {
      const float c = (a - std::pow(a, static_cast<float>(k))) / static_cast<float>(k * (k - 1));
      series = at::vec::fmadd(series, w.neg(), Vec(c));
    }
    return series * w * w;
  }

  // Near the teacher, where all of a vector mostly is, without the logarithms of the far forms.
  template <bool NEED_VALUE>
  JSDTerms jsd_terms(const Vec& z_b, const Vec& r, const Vec& m, const Vec& inv_p) const {
    const float b = q.beta, a = 1.0f - b;
    const Vec one(1.0f), near = r.abs() <= Vec(SERIES_BELOW), x = clip(r, SERIES_BELOW);
    const Vec p_t = vexp(z_b - m) * inv_p, w = x + vphi(x), aw = Vec(a) * w, log_aw = aw.log1p();
    JSDTerms t{Vec(0.0f), p_t * (one + w), x - log_aw};
    if constexpr (NEED_VALUE) {
      const Vec small = w.abs() < Vec(0.1f);
      t.value = jsd_series(w, a);
      if (!all(small)) {
        const Vec parts = Vec(a) * ((one + w) * x - w) - ((one + aw) * log_aw - aw);
        t.value = Vec::blendv(parts, t.value, small);
      }
      t.value = t.value * p_t;
    }
    if (all(near)) return t;
    const Vec p_s = vexp(z_b - m + r) * inv_p;
    const Vec q_abs = vexp(r.abs().neg());  // the smaller side over the larger one
    const Vec mix = Vec::blendv(Vec(b) + Vec(a) * q_abs, Vec(a) + Vec(b) * q_abs, r > Vec(0.0f));
    const Vec far = mix.log().neg(), log_sm = far + at::vec::minimum(r, Vec(0.0f));
    const Vec log_tm = far - at::vec::maximum(r, Vec(0.0f));
    const Vec value = Vec(b) * p_t * log_tm + Vec(a) * p_s * log_sm;
    return {Vec::blendv(value, t.value, near), Vec::blendv(p_s, t.p_s, near),
            Vec::blendv(log_sm, t.log_sm, near)};
  }

  double jsd(double kl) {
    const Split shift(st.c + kl);
    const Vec m(static_cast<float>(st.m)), inv_p(static_cast<float>(1.0 / st.p)), zero(0.0f);
    double value = 0, moment = 0, mass = 0;
    for (int64_t begin = 0; begin < q.vocab; begin += BLOCK) {
      Vec value_v(0.0f), moment_v(0.0f), mass_v(0.0f);
      for_vectors(begin, std::min(begin + BLOCK, q.vocab), [&](int64_t j, int64_t n) {
        const JSDTerms t = jsd_terms<true>(load(z + j, n), shift.from(load(d + j, n)), m, inv_p);
        value_v = value_v + only(t.value, 0.0f, n);
        moment_v = moment_v + only(t.p_s * t.log_sm, 0.0f, n);
        mass_v = mass_v + only(t.p_s, 0.0f, n);
      });
      value += sum(value_v), moment += sum(moment_v), mass += sum(mass_v);
    }
    if (q.need_grad) {
      const Vec mean(static_cast<float>(moment / mass)), factor((1.0f - q.beta) * scale);
      for_vectors(0, q.vocab, [&](int64_t j, int64_t n) {
        const Vec z_b = load(z + j, n), diff = load(d + j, n);
        const JSDTerms t = jsd_terms<false>(z_b, shift.from(diff), m, inv_p);
        put(j, t.p_s * (t.log_sm - mean) * slope(z_b, diff) * factor, n);
      });
    }
    return value;
  }

  double run() {
    for (int64_t begin = 0; begin < q.vocab; begin += BLOCK) {
      fold(begin, std::min(begin + BLOCK, q.vocab));
    }
    double kl = std::log1p(st.s / st.p);
    if (!std::isfinite(kl)) kl = direct();
    if constexpr (D == Direction::jsd) return jsd(kl);
    if (q.need_grad) gradient(kl);
    return kl;
  }
};

void kl_rows(const KLRows& q, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    double loss = 0;
    switch (q.direction) {
      case Direction::forward: loss = RowPass<Direction::forward>(q, row).run(); break;
      case Direction::reverse: loss = RowPass<Direction::reverse>(q, row).run(); break;
      case Direction::jsd: loss = RowPass<Direction::jsd>(q, row).run(); break;
    }
    q.loss[row] = static_cast<float>(loss);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace es2fast
