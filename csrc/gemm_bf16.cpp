// See gemm_bf16.h. A tile of 6 rows and 64 columns lives in 24 registers; per pair of k four vectors
// of packed b are loaded and six pairs of a broadcast.
#include "gemm_bf16.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace es2fast {
namespace {

constexpr int ROWS = 6;

uint32_t pair_at(const uint16_t* p) {
  uint32_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

__m512bh as_bf16(__m512i x) {
  __m512bh y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// out[0..M) (+)= a[0..M) b over one K block. Pairs of a's row i are at a + i a_row + q a_pair (in
// elements); with an odd k the last element of a row stands alone.
template <int M>
void tile(const uint16_t* a, int64_t a_row, int64_t a_pair, const uint32_t* b, int64_t k, bool odd,
          float* out, int64_t stride, int64_t columns, bool add) {
  __m512 acc[M][4];
  for (auto& row : acc) {
    for (auto& x : row) x = _mm512_setzero_ps();
  }
  const int64_t pairs = k / 2;
  for (int64_t q = 0; q < pairs; ++q) {
    __m512bh b_v[4];
    for (int c = 0; c < 4; ++c) b_v[c] = as_bf16(_mm512_loadu_si512(b + q * PANEL + 16 * c));
    for (int i = 0; i < M; ++i) {
      const auto a_v = as_bf16(_mm512_set1_epi32(static_cast<int>(pair_at(a + i * a_row + q * a_pair))));
      for (int c = 0; c < 4; ++c) acc[i][c] = _mm512_dpbf16_ps(acc[i][c], b_v[c], a_v);
    }
  }
  if (odd) {
    for (int i = 0; i < M; ++i) {
      const auto a_v = as_bf16(_mm512_set1_epi32(a[i * a_row + pairs * a_pair]));
      for (int c = 0; c < 4; ++c) {
        const auto b_v = as_bf16(_mm512_loadu_si512(b + pairs * PANEL + 16 * c));
        acc[i][c] = _mm512_dpbf16_ps(acc[i][c], b_v, a_v);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    float* row = out + i * stride;
    for (int c = 0; c < 4; ++c) {
      const int64_t left = std::clamp<int64_t>(columns - 16 * c, 0, 16);
      const auto mask = static_cast<__mmask16>((1u << left) - 1);
      if (add) acc[i][c] = _mm512_add_ps(acc[i][c], _mm512_maskz_loadu_ps(mask, row + 16 * c));
      _mm512_mask_storeu_ps(row + 16 * c, mask, acc[i][c]);
    }
  }
}

void tiles(const uint16_t* a, int64_t a_row, int64_t a_pair, const uint32_t* b, int64_t k, bool odd,
           float* out, int64_t stride, int64_t rows, int64_t columns, bool add) {
  for (int64_t i = 0; i < rows; i += ROWS) {
    const uint16_t* a_i = a + i * a_row;
    float* o = out + i * stride;
    switch (std::min<int64_t>(ROWS, rows - i)) {
      case 6: tile<6>(a_i, a_row, a_pair, b, k, odd, o, stride, columns, add); break;
      case 5: tile<5>(a_i, a_row, a_pair, b, k, odd, o, stride, columns, add); break;
      case 4: tile<4>(a_i, a_row, a_pair, b, k, odd, o, stride, columns, add); break;
      case 3: tile<3>(a_i, a_row, a_pair, b, k, odd, o, stride, columns, add); break;
      case 2: tile<2>(a_i, a_row, a_pair, b, k, odd, o, stride, columns, add); break;
      default: tile<1>(a_i, a_row, a_pair, b, k, odd, o, stride, columns, add); break;
    }
  }
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
void pack_rows(const uint16_t* b, int64_t stride, int64_t rows, int64_t k, uint32_t* out) {
  const int64_t pairs = k / 2, all_pairs = (k + 1) / 2;
  int64_t q = 0;
  for (; q + 16 <= pairs; q += 16) {
    for (int64_t j = 0; j < PANEL; j += 16) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        r[i] = j + i < rows ? _mm512_loadu_si512(b + (j + i) * stride + 2 * q) : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + (q + i) * PANEL + j, r[i]);
    }
  }
  for (; q < all_pairs; ++q) {
    for (int64_t j = 0; j < PANEL; ++j) {
      const uint16_t* p = b + j * stride + 2 * q;
      out[q * PANEL + j] = j >= rows ? 0 : q < pairs ? pair_at(p) : p[0];
    }
  }
}

// Two rows interleaved: out[q][j] = (b[2q][j], b[2q+1][j]); zero where there is no element.
void pack_columns(const uint16_t* b, int64_t stride, int64_t columns, int64_t k, uint32_t* out,
                  int64_t width) {
  for (int64_t q = 0; q < (k + 1) / 2; ++q) {
    const uint16_t* low = b + 2 * q * stride;
    for (int64_t j = 0; j < width; j += 16) {
      const int64_t left = std::clamp<int64_t>(columns - j, 0, 16);
      const auto mask = static_cast<__mmask16>((1u << left) - 1);
      __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + j));
      if (2 * q + 1 < k) {
        const __m256i high = _mm256_maskz_loadu_epi16(mask, low + stride + j);
        x = _mm512_or_si512(x, _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      }
      _mm512_storeu_si512(out + q * width + j, x);
    }
  }
}

}  // namespace

void gemm_nt_panel(Bf16Matrix a, Bf16Matrix b, Fp32Matrix out, int64_t m, int64_t n, int64_t k,
                   int64_t panel, uint32_t* scratch) {
  const int64_t first = panel * PANEL, columns = std::min(PANEL, n - first);
  for (int64_t at = 0; at < k; at += K_BLOCK) {
    const int64_t size = std::min(K_BLOCK, k - at);
    pack_rows(b.data + first * b.stride + at, b.stride, columns, size, scratch);
    tiles(a.data + at, a.stride, 2, scratch, size, size % 2, out.data + first, out.stride, m, columns,
          at > 0);
  }
}

void gemm_nn_panel(Bf16Matrix a, Bf16Matrix b, Fp32Matrix out, int64_t m, int64_t n, int64_t k,
                   bool add, int64_t panel, uint32_t* scratch) {
  const int64_t first = panel * PANEL, columns = std::min(PANEL, n - first);
  for (int64_t at = 0; at < k; at += K_BLOCK) {
    const int64_t size = std::min(K_BLOCK, k - at);
    pack_columns(b.data + at * b.stride + first, b.stride, columns, size, scratch, PANEL);
    tiles(a.data + at, a.stride, 2, scratch, size, size % 2, out.data + first, out.stride, m, columns,
          add || at > 0);
  }
}

void pack_tn_panel(Bf16Matrix b, int64_t m, int64_t n, int64_t panel, uint32_t* packed) {
  const int64_t first = panel * PANEL;
  pack_columns(b.data + first, b.stride, std::min(PANEL, n - first), m,
               packed + panel * ((m + 1) / 2) * PANEL, PANEL);
}

void gemm_tn_rows(Bf16Matrix a, const uint32_t* packed, Fp32Matrix out, int64_t m, int64_t n,
                  int64_t k, bool add, int64_t block, uint32_t* scratch) {
  const int64_t first = block * TN_ROWS, rows = std::min(TN_ROWS, k - first), pairs = (m + 1) / 2;
  pack_columns(a.data + first, a.stride, rows, m, scratch, TN_ROWS);
  const auto* a_pairs = reinterpret_cast<const uint16_t*>(scratch);
  for (int64_t at = 0; at < pairs; at += TN_PAIRS) {
    const int64_t some = std::min(TN_PAIRS, pairs - at);
    for (int64_t j = 0; j < n; j += PANEL) {
      tiles(a_pairs + 2 * TN_ROWS * at, 2, 2 * TN_ROWS, packed + (j / PANEL * pairs + at) * PANEL,
            2 * some, false, out.data + j, out.stride, rows, std::min(PANEL, n - j), add || at > 0);
    }
  }
}

void to_bf16(Fp32Matrix in, int64_t rows, int64_t columns, uint16_t* out, int64_t stride) {
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

}  // namespace es2fast
