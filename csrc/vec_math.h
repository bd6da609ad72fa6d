// Vector helpers on at::vec for the instruction set that this file is compiled for.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace es2fast {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

// e^x to about 1 ulp; 0 for -inf, NaN stays NaN.
inline Vec vexp(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  // e^x = 2^n e^r with |r| <= ln 2 / 2; vscalef makes 2^n, over- and underflow included
  const __m512 v = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), v);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(p, n);
#else
  return x.exp();
#endif
}

// e^u - 1 - u for |u| <= 0.5 by its Taylor series.
inline Vec vphi(const Vec& u) {
  Vec a(1.0f / 40320);
  for (float c : {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f}) {
    a = at::vec::fmadd(a, u, Vec(c));
  }
  return a * u * u;
}

inline Vec clip(const Vec& u, float bound) {
  return at::vec::clamp(u, Vec(-bound), Vec(bound));
}

inline float sum(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

inline float max(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

inline bool all(const Vec& mask) {
  return mask.zero_mask() == 0;
}

// Runs body(offset, count) over [begin, end): whole vectors, then what is left.
template <typename Body>
inline void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t j = begin;
  for (; j + W <= end; j += W) body(j, W);
  if (j < end) body(j, end - j);
}

inline Vec load(const float* p, int64_t count) {
  return count == W ? Vec::loadu(p) : Vec::loadu(p, count);
}

inline void store(float* p, const Vec& x, int64_t count) {
  if (count == W) {
    x.store(p);
  } else {
    x.store(p, static_cast<int>(count));
  }
}

// x in the first `count` lanes, `rest` in the others.
inline Vec only(const Vec& x, float rest, int64_t count) {
  return count == W ? x : Vec::set(Vec(rest), x, count);
}

}  // namespace CPU_CAPABILITY
}  // namespace es2fast
