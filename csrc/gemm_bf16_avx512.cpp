// AVX512_BF16. A tile of 6 rows and 64 columns lives in 24 registers; per pair of k four vectors of
// packed b are loaded and six pairs of a broadcast.
#include "gemm_bf16_pack.inl"
#include "gemm_bf16_panels.inl"

namespace es2fast {
namespace {

constexpr int ROWS = 6;

__m512bh as_bf16(__m512i x) {
  __m512bh y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// out[0..M) (+)= a[0..M) b over one K block. Pairs of a's row i are at a + i a_row + q a_pair (in
// elements); with an odd k the last element of a row stands alone.
template <int M>
void tile(const uint16_t* a, int64_t a_row, int64_t a_pair, const uint32_t* b, int64_t k, float* out,
          int64_t stride, int64_t columns, bool add) {
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
  if (k % 2) {
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

void tiles(const uint16_t* a, int64_t a_row, int64_t a_pair, const uint32_t* b, int64_t k,
           Fp32Matrix out, int64_t rows, int64_t columns, bool add) {
  for (int64_t i = 0; i < rows; i += ROWS) {
    const uint16_t* a_i = a + i * a_row;
    float* o = out.data + i * out.stride;
    switch (std::min<int64_t>(ROWS, rows - i)) {
      case 6: tile<6>(a_i, a_row, a_pair, b, k, o, out.stride, columns, add); break;
      case 5: tile<5>(a_i, a_row, a_pair, b, k, o, out.stride, columns, add); break;
      case 4: tile<4>(a_i, a_row, a_pair, b, k, o, out.stride, columns, add); break;
      case 3: tile<3>(a_i, a_row, a_pair, b, k, o, out.stride, columns, add); break;
      case 2: tile<2>(a_i, a_row, a_pair, b, k, o, out.stride, columns, add); break;
      default: tile<1>(a_i, a_row, a_pair, b, k, o, out.stride, columns, add); break;
    }
  }
}

struct Avx512 {
  static constexpr int64_t K_GROUP = 2;
  static constexpr int64_t TN_ROWS = 8 * ROWS;
  static constexpr int64_t TN_PAIRS = 512;  // 128 KiB of a packed panel

  static void pack_rows(Bf16Matrix b, int64_t rows, int64_t k, uint32_t* out) {
    pack_transposed(b, rows, k, out);
  }

  static void pack_columns(Bf16Matrix b, int64_t columns, int64_t k, uint32_t* out) {
    pack_interleaved(b, columns, k, out, PANEL);
  }

  static void pack_left(Bf16Matrix a, int64_t rows, int64_t k, uint32_t* out) {
    pack_interleaved(a, rows, k, out, TN_ROWS);
  }

  static void to_bf16(Fp32Matrix in, int64_t rows, int64_t columns, uint16_t* out, int64_t stride) {
    round_to_bf16(in, rows, columns, out, stride);
  }

  void multiply(Bf16Matrix a, const uint32_t* b, int64_t k, Fp32Matrix out, int64_t rows,
                int64_t columns, bool add) {
    tiles(a.data, a.stride, 2, b, k, out, rows, columns, add);
  }

  void multiply_packed(const uint32_t* a, const uint32_t* b, int64_t pairs, Fp32Matrix out,
                       int64_t rows, int64_t columns, bool add) {
    tiles(reinterpret_cast<const uint16_t*>(a), 2, 2 * TN_ROWS, b, 2 * pairs, out, rows, columns, add);
  }
};

}  // namespace

const Bf16Gemm gemm_bf16_avx512 = table_of<Avx512>("AVX512_BF16");

}  // namespace es2fast
