// AMX's tile intrinsics in plain C++, for machines without it: put before csrc/gemm_bf16_amx.cpp with
// -include. By the pseudo-code of Intel's instruction set reference; what would be an invalid opcode
// there ends the process here.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#define ES2FAST_EMULATED_AMX

namespace amx {

struct Tile {
  int rows = 0, row_bytes = 0;
  unsigned char data[16][64] = {};
};

struct State {
  bool configured = false;
  Tile tiles[8];
};
inline thread_local State state;

inline void require(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

inline Tile& tile(int i) {
  require(state.configured, "no tiles are configured");
  require(state.tiles[i].rows > 0, "a tile that is not configured");
  return state.tiles[i];
}

inline void release() {
  state = State{};
}

inline void load_config(const void* memory) {
  unsigned char bytes[64];
  std::memcpy(bytes, memory, sizeof bytes);
  release();
  require(bytes[0] == 1 && bytes[1] == 0, "palette 1 that starts at row 0");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    const int rows = bytes[48 + i];
    require(i < 8 || (rows == 0 && row_bytes == 0), "more than eight tiles");
    require(rows <= 16 && row_bytes <= 64, "a tile of at most 16 rows of 64 bytes");
    require((rows == 0) == (row_bytes == 0), "a tile has rows and bytes, or neither");
    if (i < 8) state.tiles[i].rows = rows, state.tiles[i].row_bytes = row_bytes;
  }
  state.configured = true;
}

inline void zero(int i) {
  std::memset(tile(i).data, 0, sizeof(Tile::data));
}

inline void load(int i, const void* base, long stride) {
  Tile& t = tile(i);
  zero(i);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(t.data[r], static_cast<const char*>(base) + r * stride, t.row_bytes);
  }
}

inline void store(int i, void* base, long stride) {
  const Tile& t = tile(i);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, t.data[r], t.row_bytes);
  }
}

// Subnormals are zeros, of operands and of results.
inline float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

inline float half(const unsigned char* row, int i) {
  uint16_t bits;
  std::memcpy(&bits, row + 2 * i, sizeof bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return flushed(x);
}

// Even and odd elements of k are summed apart, by fused multiply-adds, then added to what was there.
inline void dpbf16ps(int to, int left, int right) {
  Tile& c = tile(to);
  const Tile &a = tile(left), &b = tile(right);
  require(to != left && to != right && left != right, "three different tiles");
  require(a.rows == c.rows && b.row_bytes == c.row_bytes, "the tiles' rows and columns agree");
  require(a.row_bytes == 4 * b.rows, "the tiles' pairs of k agree");
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float sum[2] = {0, 0};
      for (int k = 0; k < b.rows; ++k) {
        for (int i = 0; i < 2; ++i) {
          sum[i] = flushed(std::fma(half(a.data[m], 2 * k + i), half(b.data[k], 2 * n + i), sum[i]));
        }
      }
      float old;
      std::memcpy(&old, c.data[m] + 4 * n, sizeof old);
      const float x = flushed(flushed(old) + flushed(sum[0] + sum[1]));
      std::memcpy(c.data[m] + 4 * n, &x, sizeof x);
    }
  }
}

}  // namespace amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(memory) amx::load_config(memory)
#define _tile_release() amx::release()
#define _tile_loadd(tile, base, stride) amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx::store(tile, base, stride)
#define _tile_zero(tile) amx::zero(tile)
#define _tile_dpbf16ps(to, left, right) amx::dpbf16ps(to, left, right)
