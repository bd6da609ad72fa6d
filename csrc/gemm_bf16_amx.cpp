// AMX: TDPBF16PS multiplies a tile of a (16 x 32) by one of packed b (16 pairs x 16) into one of the
// result (16 x 16); fp32 sums, subnormals are zeros.
//
// Of the eight tiles four hold 32 x 32 of the result, two of a, two of b. Floor, by the throughputs of
// Intel's optimisation manual (a TDPBF16PS 16 cycles, a tile load from the first-level cache 8, a
// store 16): each 32 of k are 64 cycles of multiplying, 1024 flop per cycle, beside 4 loads, 32 cycles;
// 16 x 64 would take 5 loads, four times 16 x 16 would take 8, all 64 cycles. 32 columns of packed b
// (32 KiB) stay in the first level while a streams by at 32 bytes per cycle. A K block of 512, 1024
// cycles, also reads and writes its result, 96. None of this was measured.
#include "gemm_bf16_pack.inl"
#include "gemm_bf16_panels.inl"

namespace es2fast {
namespace {

constexpr int64_t TILE = 16;          // rows of a tile
constexpr int64_t TILE_K = 32;        // elements of k in one
constexpr int64_t TILE_BYTES = 64;    // per row
constexpr int64_t BLOCK = 2 * TILE;   // rows and columns of the result at once
constexpr int64_t PAIR = 4 * PANEL;   // bytes from one pair of packed b to the next

// What LDTILECFG reads.
struct alignas(64) Palette {
  uint8_t id = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The compiler finishes its writes to memory first: GCC's tile intrinsics do not say what they read.
void written(const void* memory) {
  asm volatile("" : : "r"(memory) : "memory");
}

// The shapes of the tiles: 0 1 / 2 3 hold the result, 4 and 5 rows of a, 6 and 7 columns of b.
class Tiles {
 public:
  ~Tiles() {
    if (rows_ != 0) _tile_release();
  }

  // For `rows` x `columns` of the result, both 1 to BLOCK.
  void shape(int64_t rows, int64_t columns) {
    if (rows == rows_ && columns == columns_) return;
    rows_ = rows, columns_ = columns;
    Palette palette;
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t some = std::clamp<int64_t>(rows - i * TILE, 0, TILE);
      for (int64_t j = 0; j < 2; ++j) {
        set(palette, 2 * i + j, some, 4 * std::clamp<int64_t>(columns - j * TILE, 0, TILE));
      }
      set(palette, 4 + i, some, TILE_BYTES);
      set(palette, 6 + i, TILE, 4 * std::clamp<int64_t>(columns - i * TILE, 0, TILE));
    }
    written(&palette);
    _tile_loadconfig(&palette);
  }

 private:
  // A tile has both rows and bytes, or neither.
  static void set(Palette& palette, int64_t tile, int64_t rows, int64_t bytes) {
    palette.rows[tile] = static_cast<uint8_t>(bytes ? rows : 0);
    palette.row_bytes[tile] = static_cast<uint16_t>(rows ? bytes : 0);
  }

  int64_t rows_ = 0, columns_ = 0;
};

// Tile R C of the result += 32 of k; strides in bytes.
template <int R, int C>
void multiply_tiles(const uint16_t* a, int64_t a_row, const uint32_t* b) {
  _tile_loadd(6, b, PAIR);
  _tile_loadd(4, a, a_row);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (C == 2) {
    _tile_loadd(7, b + TILE, PAIR);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (R == 2) {
    _tile_loadd(5, a + TILE * a_row / 2, a_row);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

template <int R, int C>
void load_result(const float* out, int64_t row_bytes, bool add) {
  if (!add) {
    _tile_zero(0);
    if constexpr (C == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && C == 2) _tile_zero(3);
    return;
  }
  const float* below = out + TILE * row_bytes / 4;
  _tile_loadd(0, out, row_bytes);
  if constexpr (C == 2) _tile_loadd(1, out + TILE, row_bytes);
  if constexpr (R == 2) _tile_loadd(2, below, row_bytes);
  if constexpr (R == 2 && C == 2) _tile_loadd(3, below + TILE, row_bytes);
}

template <int R, int C>
void store_result(float* out, int64_t row_bytes) {
  float* below = out + TILE * row_bytes / 4;
  _tile_stored(0, out, row_bytes);
  if constexpr (C == 2) _tile_stored(1, out + TILE, row_bytes);
  if constexpr (R == 2) _tile_stored(2, below, row_bytes);
  if constexpr (R == 2 && C == 2) _tile_stored(3, below + TILE, row_bytes);
}

// The left operand: tile g of its rows is at data + g step, in elements.
struct Left {
  const uint16_t* data;
  int64_t row, step;
};

// R x C tiles of out (+)= a b; what is left of k after whole tiles of a lies in `tail`.
template <int R, int C>
void block(Left a, const uint16_t* tail, const uint32_t* b, int64_t k, Fp32Matrix out, bool add) {
  load_result<R, C>(out.data, 4 * out.stride, add);
  for (int64_t g = 0; g < k / TILE_K; ++g) {
    multiply_tiles<R, C>(a.data + g * a.step, 2 * a.row, b + g * TILE * PANEL);
  }
  if (k % TILE_K) multiply_tiles<R, C>(tail, TILE_BYTES, b + k / TILE_K * TILE * PANEL);
  store_result<R, C>(out.data, 4 * out.stride);
}

class Amx {
 public:
  static constexpr int64_t K_GROUP = TILE_K;
  static constexpr int64_t TN_ROWS = 2 * BLOCK;
  static constexpr int64_t TN_PAIRS = K_BLOCK / 2;

  static void pack_rows(Bf16Matrix b, int64_t rows, int64_t k, uint32_t* out) {
    pack_transposed(b, rows, k, out);
    end_in_zeros(k, out, PANEL);
  }

  static void pack_columns(Bf16Matrix b, int64_t columns, int64_t k, uint32_t* out) {
    pack_interleaved(b, columns, k, out, PANEL);
    end_in_zeros(k, out, PANEL);
  }

  // TN_ROWS rows of 32 elements of k, then the next 32: whole tiles, one after the other.
  static void pack_left(Bf16Matrix a, int64_t rows, int64_t k, uint32_t* out) {
    pack_interleaved(a, rows, k, out, TN_ROWS);
    end_in_zeros(k, out, TN_ROWS);
    for (int64_t q = 0; q < k; q += TILE_K, out += TILE * TN_ROWS) {
      __m512i r[TN_ROWS / TILE][TILE];
      for (int64_t i = 0; i < TN_ROWS; ++i) {
        r[i % (TN_ROWS / TILE)][i / (TN_ROWS / TILE)] = _mm512_loadu_si512(out + TILE * i);
      }
      for (int64_t t = 0; t < TN_ROWS / TILE; ++t) {
        transpose16(r[t]);
        for (int64_t i = 0; i < TILE; ++i) _mm512_storeu_si512(out + TILE * (TILE * t + i), r[t][i]);
      }
    }
  }

  static void to_bf16(Fp32Matrix in, int64_t rows, int64_t columns, uint16_t* out, int64_t stride) {
    round_to_bf16(in, rows, columns, out, stride);
  }

  void multiply(Bf16Matrix a, const uint32_t* b, int64_t k, Fp32Matrix out, int64_t rows,
                int64_t columns, bool add) {
    blocks({a.data, a.stride, TILE_K}, b, k, out, rows, columns, add);
  }

  void multiply_packed(const uint32_t* a, const uint32_t* b, int64_t pairs, Fp32Matrix out,
                       int64_t rows, int64_t columns, bool add) {
    blocks({reinterpret_cast<const uint16_t*>(a), TILE_K, TILE_K * TN_ROWS}, b, 2 * pairs, out, rows,
           columns, add);
  }

 private:
  static void end_in_zeros(int64_t k, uint32_t* out, int64_t width) {
    const int64_t pairs = (k + 1) / 2;
    std::fill(out + pairs * width, out + padded_pairs<Amx>(k) * width, 0u);
  }

  void blocks(Left a, const uint32_t* b, int64_t k, Fp32Matrix out, int64_t rows, int64_t columns,
              bool add) {
    for (int64_t j = 0; j < columns; j += BLOCK) {
      for (int64_t i = 0; i < rows; i += BLOCK) {
        const int64_t height = std::min(BLOCK, rows - i), width = std::min(BLOCK, columns - j);
        const Left left{a.data + i * a.row, a.row, a.step};
        const Fp32Matrix o{out.data + i * out.stride + j, out.stride};
        tiles_.shape(height, width);
        if (k % TILE_K) copy_tail(left, height, k);
        written(b);
        if (height > TILE) {
          width > TILE ? block<2, 2>(left, tail_, b + j, k, o, add)
                       : block<2, 1>(left, tail_, b + j, k, o, add);
        } else {
          width > TILE ? block<1, 2>(left, tail_, b + j, k, o, add)
                       : block<1, 1>(left, tail_, b + j, k, o, add);
        }
      }
    }
  }

  // The elements of k after the last whole tile, with zeros behind: a tile load would read on.
  void copy_tail(Left a, int64_t rows, int64_t k) {
    const auto mask = static_cast<__mmask32>((1u << k % TILE_K) - 1);
    for (int64_t i = 0; i < rows; ++i) {
      const uint16_t* row = a.data + i * a.row + k / TILE_K * a.step;
      _mm512_store_si512(tail_ + i * TILE_K, _mm512_maskz_loadu_epi16(mask, row));
    }
    written(tail_);
  }

  Tiles tiles_;
  alignas(64) uint16_t tail_[BLOCK * TILE_K];
};

}  // namespace

const Bf16Gemm gemm_bf16_amx = table_of<Amx>("AMX");

}  // namespace es2fast
