// Packing with AVX-512, for both of its multipliers: a uint32 holds a pair of k (VNNI), a row of them
// one pair of all columns. See gemm_bf16_panels.inl.
#include "gemm_bf16.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace es2fast {
namespace {

uint32_t pair_at(const uint16_t* p) {
  uint32_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// 16 x 16 transpose of 32-bit elements.
void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // r[4 g + i]: lane l holds column 4 l + i of rows 4 g .. 4 g + 3
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Rows of b become columns: out[q][j] = (b[j][2q], b[j][2q+1]); zero where there is no element.
void pack_transposed(Bf16Matrix b, int64_t rows, int64_t k, uint32_t* out) {
  const int64_t pairs = k / 2, all_pairs = (k + 1) / 2;
  int64_t q = 0;
  for (; q + 16 <= pairs; q += 16) {
    for (int64_t j = 0; j < PANEL; j += 16) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        r[i] = j + i < rows ? _mm512_loadu_si512(b.data + (j + i) * b.stride + 2 * q) : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + (q + i) * PANEL + j, r[i]);
    }
  }
  for (; q < all_pairs; ++q) {
    for (int64_t j = 0; j < PANEL; ++j) {
      const uint16_t* p = b.data + j * b.stride + 2 * q;
      out[q * PANEL + j] = j >= rows ? 0 : q < pairs ? pair_at(p) : p[0];
    }
  }
}

// Two rows interleaved: out[q][j] = (b[2q][j], b[2q+1][j]); zero where there is no element.
void pack_interleaved(Bf16Matrix b, int64_t columns, int64_t k, uint32_t* out, int64_t width) {
  for (int64_t q = 0; q < (k + 1) / 2; ++q) {
    const uint16_t* low = b.data + 2 * q * b.stride;
    for (int64_t j = 0; j < width; j += 16) {
      const int64_t left = std::clamp<int64_t>(columns - j, 0, 16);
      const auto mask = static_cast<__mmask16>((1u << left) - 1);
      __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + j));
      if (2 * q + 1 < k) {
        const __m256i high = _mm256_maskz_loadu_epi16(mask, low + b.stride + j);
        x = _mm512_or_si512(x, _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      }
      _mm512_storeu_si512(out + q * width + j, x);
    }
  }
}

// Rounded to nearest even.
void round_to_bf16(Fp32Matrix in, int64_t rows, int64_t columns, uint16_t* out, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += 16) {
      const int64_t left = std::min<int64_t>(columns - j, 16);
      const auto mask = static_cast<__mmask16>((1u << left) - 1);
      const __m256bh x = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, in.data + i * in.stride + j));
      __m256i bits;
      std::memcpy(&bits, &x, sizeof bits);
      _mm256_mask_storeu_epi16(out + i * stride + j, mask, bits);
    }
  }
}

}  // namespace
}  // namespace es2fast
