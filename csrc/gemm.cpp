// Matrix products with float32 results whose bits do not depend on the number of threads (but for
// the tiles of a float32 dX, see tile_of_dx).
//
// Two bfloat16 inputs go to our own kernels where the CPU has them (gemm_bf16.h). Everything else is
// cut into fixed blocks of the result, each made by one thread with torch's float32 GEMM: a GEMM
// left to spread itself over threads may sum in another order with another number of them. 16-bit
// inputs are upcast a block at a time, so that a block stays in the second-level cache.
#include "gemm_bf16.h"
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/alloc_cpu.h>

#include <memory>
#include <vector>

namespace es2fast {
namespace {

constexpr int64_t BLOCK = 256;      // rows or columns of the result per task
constexpr int64_t UPCAST_K = 1024;  // rows of a 16-bit (k, n) operand upcast at a time
constexpr int64_t PACKED_K = 4096;  // of a float32 one: the GEMM underneath packs what it is given
constexpr int64_t LEAST_ROWS = 64;  // of a tile of dX
constexpr int64_t FEW_THREADS = 4;  // up to which columns alone are enough for float32
constexpr int64_t COLUMNS_STEP = 16;
constexpr int64_t TASKS = 4;        // per thread: the last ones leave at most a quarter idle

void check_operand(const at::Tensor& tensor, const char* name) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
      ": expected float32, bfloat16 or float16, got ", tensor.toString());
  TORCH_CHECK(tensor.device().is_cpu() && tensor.dim() == 2, name, ": expected a CPU matrix");
}

void check(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, int64_t k_a, int64_t k_b,
           int64_t rows, int64_t columns, at::ScalarType type = at::kFloat) {
  check_operand(a, "a");
  check_operand(b, "b");
  check_matrix(out, type, "out");
  TORCH_CHECK(k_a == k_b, "a and b: inner sizes ", k_a, " and ", k_b);
  TORCH_CHECK(
      out.size(0) == rows && out.size(1) == columns, "out: expected ", rows, " x ", columns, ", got ",
      out.sizes());
}

int64_t count_of(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

// Runs body(task) for every task, on several threads, below autograd. There are always two tasks or
// more: a single one would run outside of a parallel region, where the GEMM inside would use all
// threads.
template <typename Body>
void for_tasks(int64_t tasks, const Body& body) {
  at::parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd guard;
    for (int64_t i = begin; i < std::min(end, tasks); ++i) body(i);
  });
}

// Runs body(first, length) for every block of [0, size).
template <typename Body>
void for_blocks(int64_t size, const Body& body) {
  for_tasks(count_of(size, BLOCK), [&](int64_t i) {
    body(i * BLOCK, std::min(BLOCK, size - i * BLOCK));
  });
}

// What one task makes of dX (m, n).
struct Tile {
  int64_t rows, columns;
  int64_t tasks(int64_t m, int64_t n) const { return count_of(m, rows) * count_of(n, columns); }
};

// Columns of FEW_THREADS tasks, or twice as many and so on, alike and of BLOCK at most: threads get
// equal shares of 1, 2 or 4 of them, whatever n is.
int64_t even_columns(int64_t n) {
  const int64_t tasks = FEW_THREADS * count_of(n, FEW_THREADS * BLOCK);
  return count_of(count_of(n, tasks), COLUMNS_STEP) * COLUMNS_STEP;
}

// A tile of all rows packs its operands least: 256 x 256 is 12 to 25 % faster in float32 than what
// it is cut into here. So it is cut only until every thread has TASKS of them.
Tile tile_of_dx(int64_t m, int64_t n, bool bf16, int64_t threads) {
  Tile tile{std::max<int64_t>(m, 1), bf16 ? PANEL : BLOCK};
  if (!bf16 && threads <= FEW_THREADS) return {tile.rows, std::max<int64_t>(even_columns(n), 1)};
  while (tile.tasks(m, n) < TASKS * threads && tile.rows > LEAST_ROWS) {
    tile.rows = std::max(LEAST_ROWS, (tile.rows + 1) / 2);
  }
  if (!bf16 && tile.tasks(m, n) < TASKS * threads) tile.columns = BLOCK / 2;
  return tile;
}

// This machine's own bfloat16 GEMMs, or null.
const Bf16Gemm* gemm_of_machine() {
  static const Bf16Gemm* const chosen = choose_gemm_bf16(capability());
  return chosen;
}

// The GEMMs that take these operands; null: torch's.
const Bf16Gemm* gemm_for(const at::Tensor& a, const at::Tensor& b) {
  const auto fits = [](const at::Tensor& t) {
    return t.scalar_type() == at::kBFloat16 && (t.stride(1) == 1 || t.size(1) <= 1);
  };
  return fits(a) && fits(b) ? gemm_of_machine() : nullptr;
}

Bf16Matrix matrix(const at::Tensor& t) {
  return {static_cast<const uint16_t*>(t.const_data_ptr()), t.stride(0)};
}

Fp32Matrix result(const at::Tensor& out) {
  return {out.mutable_data_ptr<float>(), out.stride(0)};
}

struct FreeCpu {
  void operator()(void* p) const { c10::free_cpu(p); }
};
using Packed = std::unique_ptr<uint32_t[], FreeCpu>;

// Not initialised, at a multiple of 64 bytes.
Packed packed_of(int64_t size) {
  return Packed(static_cast<uint32_t*>(c10::alloc_cpu(size * sizeof(uint32_t))));
}

// Runs body(panel, scratch) for every panel of the result.
template <typename Body>
void for_panels(int64_t panels, int64_t scratch_size, const Body& body) {
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const Packed scratch = packed_of(scratch_size);
    for (int64_t i = begin; i < end; ++i) body(i, scratch.get());
  });
}

}  // namespace

std::string gemm_bf16_name() {
  const Bf16Gemm* gemm = gemm_of_machine();
  return gemm ? gemm->name : "";
}

int64_t dx_tasks(int64_t m, int64_t n, bool bf16, int64_t threads) {
  return tile_of_dx(m, n, bf16, threads).tasks(m, n);
}

// out = a b^T: (m, k), (n, k) -> (m, n)
void gemm_nt(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(0);
  check(a, b, out, k, b.size(1), m, n);
  if (k == 0) {
    out.zero_();
    return;
  }
  if (const Bf16Gemm* gemm = gemm_for(a, b)) {
    const auto a_m = matrix(a), b_m = matrix(b);
    const auto o = result(out);
    for_panels(count_of(n, PANEL), PANEL_SCRATCH, [&](int64_t panel, uint32_t* scratch) {
      gemm->nt_panel(a_m, b_m, o, m, n, k, panel, scratch);
    });
    return;
  }
  const at::Tensor wide = a.to(at::kFloat);
  for_blocks(n, [&](int64_t first, int64_t length) {
    at::Tensor block = out.narrow(1, first, length);
    at::mm_out(block, wide, b.narrow(0, first, length).to(at::kFloat).t());
  });
}

// out (+)= a b: (m, k), (k, n) -> (m, n)
void gemm_nn(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  check(a, b, out, k, b.size(0), m, n);
  if (!add) out.zero_();
  const Bf16Gemm* gemm = gemm_for(a, b);
  const Tile tile = tile_of_dx(m, n, gemm != nullptr, at::get_num_threads());
  const int64_t across = count_of(n, tile.columns), tasks = tile.tasks(m, n);
  if (gemm) {
    const auto a_m = matrix(a), b_m = matrix(b);
    const auto o = result(out);
    for_panels(tasks, PANEL_SCRATCH, [&](int64_t task, uint32_t* scratch) {
      const int64_t first = task / across * tile.rows, rows = std::min(tile.rows, m - first);
      gemm->nn_panel(
          {a_m.data + first * a_m.stride, a_m.stride}, b_m, {o.data + first * o.stride, o.stride},
          rows, n, k, true, task % across, scratch);
    });
    return;
  }
  const at::Tensor wide = a.to(at::kFloat);
  const int64_t step = b.scalar_type() == at::kFloat ? PACKED_K : UPCAST_K;
  for_tasks(tasks, [&](int64_t task) {
    const int64_t top = task / across * tile.rows, rows = std::min(tile.rows, m - top);
    const int64_t first = task % across * tile.columns, length = std::min(tile.columns, n - first);
    at::Tensor block = out.narrow(0, top, rows).narrow(1, first, length);
    for (int64_t at = 0; at < k; at += step) {
      const int64_t size = std::min(step, k - at);
      const at::Tensor part = b.narrow(0, at, size).narrow(1, first, length).to(at::kFloat);
      at::addmm_out(block, block, wide.narrow(0, top, rows).narrow(1, at, size), part);
    }
  });
}

// out (+)= a^T b: (m, k), (m, n) -> (k, n); out may be bfloat16 where nothing is added to it
void gemm_tn(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  const bool rounds = !add && out.scalar_type() == at::kBFloat16;
  check(a, b, out, m, b.size(0), k, n, rounds ? at::kBFloat16 : at::kFloat);
  if (m == 0) {
    if (!add) out.zero_();
    return;
  }
  if (const Bf16Gemm* gemm = gemm_for(a, b)) {
    const auto a_m = matrix(a), b_m = matrix(b);
    const int64_t pairs = count_of(m, gemm->k_group) * gemm->k_group / 2, tn_rows = gemm->tn_rows;
    const Packed packed = packed_of(count_of(n, PANEL) * pairs * PANEL);
    for_panels(count_of(n, PANEL), 0, [&](int64_t panel, uint32_t*) {
      gemm->pack_tn_panel(b_m, m, n, panel, packed.get());
    });
    at::parallel_for(0, count_of(k, tn_rows), 1, [&](int64_t begin, int64_t end) {
      const Packed scratch = packed_of(pairs * tn_rows);
      std::vector<float> wide(rounds ? tn_rows * n : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * tn_rows, rows = std::min(tn_rows, k - first);
        const at::Tensor block = out.narrow(0, first, rows);
        const Fp32Matrix o = rounds ? Fp32Matrix{wide.data(), n} : result(block);
        gemm->tn_block(a_m, packed.get(), o, m, n, k, add, i, scratch.get());
        if (rounds) {
          gemm->to_bf16(o, rows, n, static_cast<uint16_t*>(block.mutable_data_ptr()), out.stride(0));
        }
      }
    });
    return;
  }
  const at::Tensor wide = b.to(at::kFloat);
  for_blocks(k, [&](int64_t first, int64_t length) {
    at::Tensor block = out.narrow(0, first, length);
    const at::Tensor part = a.narrow(1, first, length).to(at::kFloat).t();
    if (rounds) {
      block.copy_(at::mm(part, wide));
    } else {
      at::addmm_out(block, block, part, wide, add ? 1 : 0);
    }
  });
}

}  // namespace es2fast
