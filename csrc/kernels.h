// What the portable side of the native library (registration.cpp) asks of the vectorised side.
//
// Every kernel is compiled once per instruction set (kernels_default.cpp, kernels_avx2.cpp,
// kernels_avx512.cpp) behind a table of function pointers; registration.cpp picks the table that
// torch itself would use on this machine. A kernel works on a range of rows and knows nothing of
// tensors or threads, so code built for a large instruction set stays inside its own file, and
// results do not depend on how rows are spread over threads.
#pragma once

#include <cstdint>

namespace es2fast {

enum class Direction : int64_t { forward = 0, reverse = 1, jsd = 2 };

// Rows of raw logits -> divergences and, in place of the student's logits, their gradient.
struct KLRows {
  float* teacher;       // (C, V) raw logits W h; overwritten
  float* student;       // (C, V) raw logits, or their difference to the teacher's; overwritten by G
  int64_t pitch;        // elements from one row to the next, in both
  int64_t vocab;        // V
  const float* bias_t;  // (V,) or null
  const float* bias_s;  // (V,) or null
  const float* scale;   // (C,) factor of each row's gradient
  float* loss;          // (C,) nats
  Direction direction;
  float beta;       // teacher's share in JSD
  float gain;       // logit_scale / temperature
  float cap_in;     // logit_scale / softcap; 0: no soft-cap
  float cap_out;    // softcap / temperature
  bool is_delta;    // `student` holds the difference
  bool need_grad;
  uint16_t* half;      // (C, V) G in bfloat16 goes here, which may be where `student` is; or null
  uint16_t* low;       // (C, V) what rounding took, in bfloat16; may be where `teacher` is; or null
  int64_t half_pitch;  // elements from one row to the next
  int64_t low_pitch;
};

// Rows of raw student logits -> maximum, sum of exponentials and, in place, G = p_s - p_t.
struct MomentRows {
  float* student;          // (C, V) raw products; overwritten by z, then by G
  int64_t pitch;           // elements from one row to the next
  int64_t vocab;           // V
  const float* row_gain;   // (C,) z = row_gain x + bias_gain bias
  const float* bias;       // (V,) or null
  float bias_gain;
  const int32_t* top_ids;  // (C, K) anchors of each row
  const float* top_probs;  // (C, K) the teacher's probabilities there
  int64_t anchors;         // K
  float* anchor_grad;      // (C, K) scratch
  float* row_max;          // (C,)
  float* row_sum;          // (C,)
  bool need_grad;
  bool half_grad;  // G in bfloat16, packed at the start of each row; else float32
};

enum class PairKind : int64_t { hinge = 0, l2 = 1, log = 2, softplus = 3, squared = 4, cosine = 5 };

// Squared distances -> loss of each row and, in place, the gradient's coefficients.
struct PairRows {
  float* tile;     // (C, M)
  int64_t pitch;   // elements from one row to the next
  int64_t columns;  // M
  const float* u;  // (C,) weights
  const float* v;  // (M,)
  float* values;   // (C,)
  PairKind kind;
  float margin, scale;
  float start;      // squared: margin^2, cosine: 1 - margin, of their double
  float log_floor;  // of d / scale
  bool need_grad;
};

// Products a.b -> squared distances, and which of them are close.
struct PairDistances {
  float* tile;       // (C, M)
  int64_t pitch;     // elements from one row to the next
  int64_t columns;   // M
  const float* a_sq;  // (C,) squared norms
  const float* b_sq;  // (M,)
  float close;       // a pair is close when d^2 < close (|a|^2 + |b|^2)
};

// Few pairs: distances and gradients straight from the differences, without GEMMs or centring.
struct FewPairs {
  const float* a;  // (n, H)
  const float* b;  // (m, H)
  int64_t n, m, width;
  PairRows pairs;  // its tile is (n, m), contiguous
  float* da;       // (n, H) or null
  float* db;       // (m, H) or null
};
constexpr int64_t FEW_COLUMNS = 32;  // of H, per task of few_gradients
constexpr int64_t FEW_ROWS = 256;    // of b at most

struct Kernels {
  const char* name;
  void (*kl_rows)(const KLRows&, int64_t begin, int64_t end);
  void (*moment_rows)(const MomentRows&, int64_t begin, int64_t end);
  void (*pair_rows)(const PairRows&, int64_t begin, int64_t end);
  void (*few_losses)(const FewPairs&, int64_t begin, int64_t end);     // rows of a
  void (*few_gradients)(const FewPairs&, int64_t begin, int64_t end);  // blocks of FEW_COLUMNS
  int64_t (*pair_distances_row)(const PairDistances&, int64_t row, int32_t* close);
};

extern const Kernels kernels_default;
#ifdef ES2FAST_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace es2fast
