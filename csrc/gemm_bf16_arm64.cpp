// arm64 BFMMLA: 2 x 2 of the result += 2 rows of four k of a times 2 columns of four k of b. Sums are
// rounded to odd, subnormals are zeros.
//
// A tile of 8 x 8 lives in 16 of the 32 registers and takes 8 loads per 16 BFMMLA. Both operands are
// packed, a of the nt and nn products 8 rows at a time (8 KiB, used for all 64 columns), so that every
// load is 16 bytes of two rows or columns and no tail reads past its operand. None of this was timed.
#include "gemm_bf16_panels.inl"

#include <arm_neon.h>

#include <cstring>

namespace es2fast {
namespace {

constexpr int64_t QUAD = 4;  // elements of k in a BFMMLA
constexpr int64_t TILE = 8;  // rows and columns of the result at once

// out[q][j] = b[j][4q .. 4q + 3] for `width` j; zero where there is no element.
void pack_transposed(Bf16Matrix b, int64_t rows, int64_t k, uint16_t* out, int64_t width) {
  for (int64_t q = 0; q < k; q += QUAD) {
    const int64_t some = std::min(QUAD, k - q);
    for (int64_t j = 0; j < width; ++j, out += QUAD) {
      uint16_t four[QUAD] = {};
      if (j < rows && some == QUAD) {
        std::memcpy(four, b.data + j * b.stride + q, sizeof four);
      } else if (j < rows) {
        std::copy_n(b.data + j * b.stride + q, some, four);
      }
      std::memcpy(out, four, sizeof four);
    }
  }
}

// The first `count` of 8 elements, zeros behind.
uint16x8_t load(const uint16_t* p, int64_t count) {
  if (count >= TILE) return vld1q_u16(p);
  uint16_t eight[TILE] = {};
  std::copy_n(p, std::max<int64_t>(count, 0), eight);
  return vld1q_u16(eight);
}

// out[q][j] = b[4q .. 4q + 3][j] for `width` j, a multiple of 8; zero where there is no element.
void pack_interleaved(Bf16Matrix b, int64_t columns, int64_t k, uint16_t* out, int64_t width) {
  for (int64_t q = 0; q < k; q += QUAD) {
    for (int64_t j = 0; j < width; j += TILE, out += QUAD * TILE) {
      uint16x8x4_t rows = {};
      for (int64_t i = 0; i < std::min(QUAD, k - q); ++i) {
        rows.val[i] = load(b.data + (q + i) * b.stride + j, columns - j);
      }
      vst4q_u16(out, rows);
    }
  }
}

bfloat16x8_t pair_at(const uint16_t* p) {
  return vreinterpretq_bf16_u16(vld1q_u16(p));
}

// out (rows, columns) (+)= a b of at most 8 rows and columns; the next four k of packed a are a_step
// elements on, those of b 4 PANEL.
void tile(const uint16_t* a, int64_t a_step, const uint16_t* b, int64_t quads, Fp32Matrix out,
          int64_t rows, int64_t columns, bool add) {
  float32x4_t acc[TILE / 2][TILE / 2] = {};  // (0, 0), (0, 1), (1, 0), (1, 1) of their 2 x 2
  for (int64_t q = 0; q < quads; ++q, a += a_step, b += QUAD * PANEL) {
    bfloat16x8_t b_v[TILE / 2];
    for (int c = 0; c < TILE / 2; ++c) b_v[c] = pair_at(b + 2 * QUAD * c);
    for (int r = 0; r < TILE / 2; ++r) {
      const bfloat16x8_t a_v = pair_at(a + 2 * QUAD * r);
      for (int c = 0; c < TILE / 2; ++c) acc[r][c] = vbfmmlaq_f32(acc[r][c], a_v, b_v[c]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    float sums[TILE];
    for (int c = 0; c < TILE / 2; ++c) {
      vst1_f32(sums + 2 * c, i % 2 ? vget_high_f32(acc[i / 2][c]) : vget_low_f32(acc[i / 2][c]));
    }
    float* row = out.data + i * out.stride;
    for (int64_t j = 0; j < columns; ++j) row[j] = add ? row[j] + sums[j] : sums[j];
  }
}

class Arm64 {
 public:
  static constexpr int64_t K_GROUP = QUAD;
  static constexpr int64_t TN_ROWS = 6 * TILE;
  static constexpr int64_t TN_PAIRS = 512;  // 8 rows or columns of them: 16 KiB

  static void pack_rows(Bf16Matrix b, int64_t rows, int64_t k, uint32_t* out) {
    pack_transposed(b, rows, k, reinterpret_cast<uint16_t*>(out), PANEL);
  }

  static void pack_columns(Bf16Matrix b, int64_t columns, int64_t k, uint32_t* out) {
    pack_interleaved(b, columns, k, reinterpret_cast<uint16_t*>(out), PANEL);
  }

  static void pack_left(Bf16Matrix a, int64_t rows, int64_t k, uint32_t* out) {
    pack_interleaved(a, rows, k, reinterpret_cast<uint16_t*>(out), TN_ROWS);
  }

  static void to_bf16(Fp32Matrix in, int64_t rows, int64_t columns, uint16_t* out, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; j += 4) {
        const int64_t some = std::min<int64_t>(4, columns - j);
        float four[4] = {};
        std::copy_n(in.data + i * in.stride + j, some, four);
        uint16_t rounded[4];
        vst1_u16(rounded, vreinterpret_u16_bf16(vcvt_bf16_f32(vld1q_f32(four))));
        std::copy_n(rounded, some, out + i * stride + j);
      }
    }
  }

  void multiply(Bf16Matrix a, const uint32_t* b, int64_t k, Fp32Matrix out, int64_t rows,
                int64_t columns, bool add) {
    for (int64_t i = 0; i < rows; i += TILE) {
      const int64_t height = std::min(TILE, rows - i);
      pack_transposed({a.data + i * a.stride, a.stride}, height, k, left_, TILE);
      across(left_, QUAD * TILE, b, (k + QUAD - 1) / QUAD, {out.data + i * out.stride, out.stride},
             height, columns, add);
    }
  }

  void multiply_packed(const uint32_t* a, const uint32_t* b, int64_t pairs, Fp32Matrix out,
                       int64_t rows, int64_t columns, bool add) {
    const auto* left = reinterpret_cast<const uint16_t*>(a);
    for (int64_t i = 0; i < rows; i += TILE) {
      across(left + QUAD * i, QUAD * TN_ROWS, b, pairs / 2, {out.data + i * out.stride, out.stride},
             std::min(TILE, rows - i), columns, add);
    }
  }

 private:
  // All columns of at most 8 rows.
  static void across(const uint16_t* a, int64_t a_step, const uint32_t* b, int64_t quads,
                     Fp32Matrix out, int64_t rows, int64_t columns, bool add) {
    const auto* right = reinterpret_cast<const uint16_t*>(b);
    for (int64_t j = 0; j < columns; j += TILE) {
      tile(a, a_step, right + QUAD * j, quads, {out.data + j, out.stride}, rows,
           std::min(TILE, columns - j), add);
    }
  }

  uint16_t left_[TILE * K_BLOCK];
};

}  // namespace

const Bf16Gemm gemm_bf16_arm64 = table_of<Arm64>("BFMMLA");

}  // namespace es2fast
