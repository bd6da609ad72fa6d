// The bfloat16 GEMMs without torch: what tests/ops/test_gemm_bf16.py compiles, also for other machines.
//
//   driver NAME                 those of one instruction set against fp64
//   driver choose CAPABILITY    prints which this machine would use, where torch has that capability
//
// Operands end where memory that may not be touched begins; the elements between their rows are NaN,
// and those between the rows of a result must stay as they were.
#include "gemm_bf16.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace es2fast;

#ifdef ES2FAST_X86
constexpr const Bf16Gemm* GEMMS[] = {&gemm_bf16_avx512, &gemm_bf16_amx};
#else
constexpr const Bf16Gemm* GEMMS[] = {&gemm_bf16_arm64};
#endif
constexpr float UNTOUCHED = 12345.0f;
constexpr double U = 0x1p-24;  // half an ulp of 1 in fp32
Bf16Gemm gemm;  // the one under test
std::mt19937 generator(0);
int failures = 0;

float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounded to nearest even.
uint16_t bf16_of(float x) {
  if (std::isnan(x)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Elements that end at the last byte before a page that may not be touched.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t size) : size_(size) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = size * static_cast<int64_t>(sizeof(T));
    const int64_t inside = (bytes + page - 1) / page * page;
    mapped_ = inside + page;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_, inside, PROT_READ | PROT_WRITE) != 0) {
      std::perror("mmap");
      std::exit(2);
    }
    data = reinterpret_cast<T*>(base_ + inside - bytes);
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  T* begin() { return data; }
  T* end() { return data + size_; }

  T* data;

 private:
  int64_t size_, mapped_;
  char* base_;
};

// Elements from the first to the last one of a strided matrix.
int64_t extent(int64_t rows, int64_t columns, int64_t stride) {
  return (rows - 1) * stride + columns;
}

struct Operand {
  Operand(int64_t rows, int64_t columns, int64_t gap)
      : rows(rows), columns(columns), stride(columns + gap), memory(extent(rows, columns, stride)) {
    std::normal_distribution<float> normal;
    std::fill(memory.begin(), memory.end(), bf16_of(std::nanf("")));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) memory.data[i * stride + j] = bf16_of(normal(generator));
    }
  }
  double at(int64_t i, int64_t j) const { return from_bf16(memory.data[i * stride + j]); }
  Bf16Matrix matrix() const { return {memory.data, stride}; }

  int64_t rows, columns, stride;
  Guarded<uint16_t> memory;
};

struct Result {
  Result(int64_t rows, int64_t columns, int64_t gap)
      : rows(rows), columns(columns), stride(columns + gap), memory(extent(rows, columns, stride)) {
    std::fill(memory.begin(), memory.end(), UNTOUCHED);
  }
  void randomise() {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) memory.data[i * stride + j] = normal(generator);
    }
  }
  float at(int64_t i, int64_t j) const { return memory.data[i * stride + j]; }
  Fp32Matrix matrix() { return {memory.data, stride}; }

  int64_t rows, columns, stride;
  Guarded<float> memory;
};

void fail(const std::string& name, const char* what, double found, double expected) {
  if (++failures <= 20) {
    std::printf("%s: %s: %.9g, expected %.9g\n", name.c_str(), what, found, expected);
  }
}

// By how much one addition may round, relatively: half an ulp to nearest. BFMMLA rounds to odd (what
// is not exact takes the neighbour with the odd mantissa), up to a whole ulp.
double rounding() {
  return std::string(gemm.name) == "BFMMLA" ? 2 * U : U;
}

// |found - sum| <= (k + 2) rounding sum |x y|, and a NaN only where an element of its own sum is one:
// every product is exact in fp32 and goes through at most k + 1 additions. Subnormals may be zeros,
// which is far below the bound for these operands.
template <typename Left, typename Right>
void compare(const std::string& name, const Result& out, const std::vector<float>& before, int64_t k,
             const Left& left, const Right& right) {
#ifdef ES2FAST_EMULATED_AMX
  if (amx::state.configured) fail(name, "tiles are still configured", 1, 0);
#endif
  const double bound = static_cast<double>(k + 2) * rounding();
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) {
      double sum = before[i * out.columns + j], size = std::fabs(sum);
      for (int64_t l = 0; l < k; ++l) {
        sum += left(i, l) * right(l, j);
        size += std::fabs(left(i, l) * right(l, j));
      }
      const double found = out.at(i, j);
      if (std::isnan(sum) != std::isnan(found)) fail(name, "NaN", found, sum);
      if (std::fabs(found - sum) > bound * size) fail(name, "value", found, sum);
    }
    const int64_t gap = i + 1 < out.rows ? out.stride - out.columns : 0;
    for (int64_t j = 0; j < gap; ++j) {
      const float found = out.at(i, out.columns + j);
      if (found != UNTOUCHED) fail(name, "between the rows", found, UNTOUCHED);
    }
  }
}

// What the result holds before: noise that is added to, or NaN that must be overwritten.
std::vector<float> prepare(Result& out, bool add) {
  std::vector<float> before(out.rows * out.columns, 0.0f);
  if (add) out.randomise();
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) {
      float& x = out.memory.data[i * out.stride + j];
      if (add) {
        before[i * out.columns + j] = x;
      } else {
        x = std::nanf("");
      }
    }
  }
  return before;
}

// Room for packed operands, full of NaN. It begins at a multiple of 64 bytes, because it takes one.
struct Scratch : Guarded<uint32_t> {
  explicit Scratch(int64_t size) : Guarded(size) { std::fill(begin(), end(), 0x7fc07fc0u); }
};

int64_t count_of(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

void check_nt(const std::string& name, const Operand& a, const Operand& b, int64_t gap) {
  Result out(a.rows, b.rows, gap);
  const auto before = prepare(out, false);
  for (int64_t panel = 0; panel < count_of(b.rows, PANEL); ++panel) {
    gemm.nt_panel(a.matrix(), b.matrix(), out.matrix(), a.rows, b.rows, a.columns, panel,
                  Scratch(PANEL_SCRATCH).data);
  }
  compare(name + " nt", out, before, a.columns, [&](int64_t i, int64_t l) { return a.at(i, l); },
          [&](int64_t l, int64_t j) { return b.at(j, l); });
}

void check_nn(const std::string& name, const Operand& a, const Operand& b, int64_t gap, bool add) {
  Result out(a.rows, b.columns, gap);
  const auto before = prepare(out, add);
  for (int64_t panel = 0; panel < count_of(b.columns, PANEL); ++panel) {
    gemm.nn_panel(a.matrix(), b.matrix(), out.matrix(), a.rows, b.columns, a.columns, add, panel,
                  Scratch(PANEL_SCRATCH).data);
  }
  compare(name + " nn", out, before, a.columns, [&](int64_t i, int64_t l) { return a.at(i, l); },
          [&](int64_t l, int64_t j) { return b.at(l, j); });
}

void check_tn(const std::string& name, const Operand& a, const Operand& b, int64_t gap, bool add) {
  const int64_t m = a.rows, k = a.columns, n = b.columns;
  const int64_t pairs = count_of(m, gemm.k_group) * gemm.k_group / 2;
  Result out(k, n, gap);
  const auto before = prepare(out, add);
  Scratch packed(count_of(n, PANEL) * pairs * PANEL);
  for (int64_t panel = 0; panel < count_of(n, PANEL); ++panel) {
    gemm.pack_tn_panel(b.matrix(), m, n, panel, packed.data);
  }
  for (int64_t block = 0; block < count_of(k, gemm.tn_rows); ++block) {
    const Fp32Matrix o{out.memory.data + block * gemm.tn_rows * out.stride, out.stride};
    gemm.tn_block(a.matrix(), packed.data, o, m, n, k, add, block,
                  Scratch(pairs * gemm.tn_rows).data);
  }
  compare(name + " tn", out, before, m, [&](int64_t i, int64_t l) { return a.at(l, i); },
          [&](int64_t l, int64_t j) { return b.at(l, j); });
}

// Of a result m x n of k products; `nan`: the last elements of the operands are NaN.
void check_gemms(int64_t m, int64_t n, int64_t k, int64_t gap, bool nan) {
  const std::string name = std::to_string(m) + " x " + std::to_string(n) + " of " + std::to_string(k);
  Operand a(m, k, gap), b(n, k, gap), b_t(k, n, gap), a_t(k, m, gap);
  if (nan) {
    for (Operand* x : {&a, &b, &b_t, &a_t}) *(x->memory.end() - 1) = bf16_of(std::nanf(""));
  }
  check_nt(name, a, b, gap);
  for (const bool add : {false, true}) {
    check_nn(name, a, b_t, gap, add);
    check_tn(name, a_t, b_t, gap, add);
  }
}

void check_to_bf16(int64_t rows, int64_t columns, int64_t gap) {
  Result in(rows, columns, gap);
  in.randomise();
  const float special[] = {
      0.0f, -0.0f, std::numeric_limits<float>::infinity(), 1.00390625f, 1.01171875f, 3.4028234e38f};
  for (int64_t j = 0; j < std::min<int64_t>(columns, 6); ++j) in.memory.data[j] = special[j];
  Operand out(rows, columns, gap);
  gemm.to_bf16(in.matrix(), rows, columns, out.memory.data, out.stride);
  const std::string name = std::to_string(rows) + " x " + std::to_string(columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const double expected = from_bf16(bf16_of(in.at(i, j)));
      if (out.at(i, j) != expected) fail(name, "to_bf16", out.at(i, j), expected);
    }
    for (int64_t j = columns; i + 1 < rows && j < out.stride; ++j) {
      if (!std::isnan(out.at(i, j))) fail(name, "to_bf16 between the rows", out.at(i, j), NAN);
    }
  }
}

int check_all() {
  const std::vector<int64_t> sizes = {1, 2, 15, 16, 17, 31, 33, 63, 65, 100};
  const int64_t count = sizes.size();
  int64_t cases = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j, ++cases) {  // every two sizes meet
      const int64_t gap = cases % 3 == 0 ? 0 : cases % 3 == 1 ? 1 : 37;
      check_gemms(sizes[i], sizes[j], sizes[(i + j) % count], gap, cases % 4 == 0);
    }
  }
  // more than one K block, sweep over m and block of rows
  const int64_t large[][3] = {{7, 70, 513}, {33, 17, 1024}, {49, 9, 1061}, {130, 3, 520}};
  for (const auto& [m, n, k] : large) {
    check_gemms(m, n, k, 5, false);
    ++cases;
  }
  for (const int64_t rows : {1, 3}) {
    for (const int64_t columns : sizes) check_to_bf16(rows, columns, rows - 1);
  }
  std::printf("%s: %lld cases, %d failures\n", gemm.name, static_cast<long long>(cases), failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "choose" && argc == 3) {
    const Bf16Gemm* chosen = choose_gemm_bf16(argv[2]);
    std::puts(chosen ? chosen->name : "none");
    return 0;
  }
  for (const Bf16Gemm* candidate : GEMMS) {
    if (what == candidate->name) {
      gemm = *candidate;
      return check_all();
    }
  }
  std::fprintf(stderr, "no instruction set %s here\n", what.c_str());
  return 2;
}
