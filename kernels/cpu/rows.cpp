// The small operations of a layer, one pass over the rows each: norms, rope with the KV write, gated activation.
//
// Statistics and arithmetic in float32, results rounded once. Writes to the pool touch the rows' slots alone.
#include <cmath>

#include "paged.h"
#include "pool.h"

namespace {

constexpr long kParallel = 1 << 15;  // elements from which more than one thread pays

// Rows are dealt in runs, so that an item is worth waking a thread for.
template <class F>
void over_rows(Pool* pool, long rows, long width, F&& f) {
  if (pool == nullptr || rows * width < kParallel) {
    for (long r = 0; r < rows; r++) f(r);
    return;
  }
  const long run = width >= kParallel / 4 ? 1 : kParallel / 4 / width;
  parallel_for(pool, (rows + run - 1) / run, [&](long item) {
    const long end = (item + 1) * run < rows ? (item + 1) * run : rows;
    for (long r = item * run; r < end; r++) f(r);
  });
}

template <class T>
void scale_row(const T* x, const T* weight, float factor, long width, T* out) {
  long j = 0;
  for (; j + W <= width; j += W) store(out + j, load(x + j) * factor * load(weight + j));
  for (; j < width; j++) from_float(to_float(x[j]) * factor * to_float(weight[j]), out + j);
}

template <class T>
void norm_row(const T* x, const T* weight, float eps, long width, T* out) {
  VF sums = {};
  long j = 0;
  for (; j + W <= width; j += W) {
    const VF v = load(x + j);
    sums += v * v;
  }
  float sum = sum_lanes(sums);
  for (; j < width; j++) sum += to_float(x[j]) * to_float(x[j]);
  scale_row(x, weight, 1.0f / std::sqrt(sum / (float)width + eps), width, out);
}

template <class T>
void add_row(const T* x, T* residual, long width) {
  long j = 0;
  for (; j + W <= width; j += W) store(residual + j, load(residual + j) + load(x + j));
  for (; j < width; j++) from_float(to_float(residual[j]) + to_float(x[j]), residual + j);
}

template <class T>
void silu_row(const T* gate, const T* up, long width, T* out) {
  long j = 0;
  for (; j + W <= width; j += W) {
    store(out + j, silu<sizeof(T) == 2>(load(gate + j)) * load(up + j));
  }
  for (; j < width; j++) {
    const float g = to_float(gate[j]);
    from_float(g / (1.0f + std::exp(-g)) * to_float(up[j]), out + j);
  }
}

template <class T>
void rotate(T* x, const float* cos_sin, long half) {
  const float *cosine = cos_sin, *sine = cos_sin + half;
  long j = 0;
  for (; j + W <= half; j += W) {
    const VF a = load(x + j), b = load(x + half + j), c = load(cosine + j), s = load(sine + j);
    store(x + j, a * c - b * s);
    store(x + half + j, b * c + a * s);
  }
  for (; j < half; j++) {
    const float a = to_float(x[j]), b = to_float(x[half + j]), c = cosine[j], s = sine[j];
    from_float(a * c - b * s, x + j);
    from_float(b * c + a * s, x + half + j);
  }
}

template <class T>
struct QkvRows {  // strides in elements, heads contiguous
  T *q, *k;
  const T* v;
  long q_row, k_row, v_row, q_heads;
};

template <class T>
void rope_kv_write(Pool* pool, const QkvRows<T>& rows, const float* cos_sin, const KvPool& kv, long layer,
                   const Batch& batch) {
  const long head_dim = kv.head_dim, value_offset = kv.block_tokens * head_dim;
  over_rows(pool, batch.rows, (rows.q_heads + 2 * kv.kv_heads) * head_dim, [&](long r) {
    const float* angles = cos_sin + batch.positions[r] * head_dim;
    T* q = rows.q + r * rows.q_row;
    T* k = rows.k + r * rows.k_row;
    const T* v = rows.v + r * rows.v_row;
    for (long h = 0; h < rows.q_heads; h++) rotate(q + h * head_dim, angles, head_dim / 2);
    const long block = batch.slots[r] / kv.block_tokens, offset = batch.slots[r] % kv.block_tokens;
    T* to = static_cast<T*>(kv.data) + block * kv.block_stride + layer * kv.layer_stride + offset * head_dim;
    for (long h = 0; h < kv.kv_heads; h++, to += kv.head_stride) {
      rotate(k + h * head_dim, angles, head_dim / 2);
      std::memcpy(to, k + h * head_dim, head_dim * sizeof(T));
      std::memcpy(to + value_offset, v + h * head_dim, head_dim * sizeof(T));
    }
  });
}

// x [outer][inner][width] by its strides, out contiguous.
template <class T>
void rms_norm(Pool* pool, const T* x, long outer_stride, long inner, long inner_stride, const T* weight, float eps,
              long rows, long width, T* out) {
  over_rows(pool, rows, width, [&](long r) {
    norm_row(x + r / inner * outer_stride + r % inner * inner_stride, weight, eps, width, out + r * width);
  });
}

template <class T>
void add_rms_norm(Pool* pool, const T* x, T* residual, const T* weight, float eps, long rows, long width, T* out) {
  over_rows(pool, rows, width, [&](long r) {
    add_row(x + r * width, residual + r * width, width);
    norm_row(residual + r * width, weight, eps, width, out + r * width);
  });
}

template <class T>
void silu_mul(Pool* pool, const T* gate_up, long row, long rows, long width, T* out) {
  over_rows(pool, rows, 4 * width, [&](long r) {
    silu_row(gate_up + r * row, gate_up + r * row + width, width, out + r * width);
  });
}

// The first place of the largest value, or of a NaN.
long largest(const float* x, long width) {
  float top = -INFINITY;
  bool nan = false;
  long j = 0;
  if (width >= W) {
    VF best = load(x);
    VI wrong = {};
    for (; j + W <= width; j += W) {
      const VF v = load(x + j);
      best = vmax(best, v);
      wrong |= v != v;
    }
    top = max_lanes(best);
    nan = any(wrong);
  }
  for (; j < width; j++) {
    top = std::fmax(top, x[j]);
    nan |= x[j] != x[j];
  }
  for (j = 0; j < width; j++)
    if (nan ? x[j] != x[j] : x[j] == top) return j;
  return 0;
}

}  // namespace

// The place of the largest of each row of x [rows][width], the first of equal ones; NaN is larger than anything.
extern "C" void ss_argmax(Pool* pool, const float* x, long rows, long width, int64_t* out) {
  over_rows(pool, rows, width, [&](long r) { out[r] = largest(x + r * width, width); });
}

#define SS_ROWS(suffix, T)                                                                                          \
  extern "C" void ss_rms_norm_##suffix(Pool* pool, const T* x, long outer_stride, long inner, long inner_stride,    \
                                       const T* weight, float eps, long rows, long width, T* out) {                \
    rms_norm(pool, x, outer_stride, inner, inner_stride, weight, eps, rows, width, out);                            \
  }                                                                                                                 \
  extern "C" void ss_add_rms_norm_##suffix(Pool* pool, const T* x, T* residual, const T* weight, float eps,         \
                                           long rows, long width, T* out) {                                        \
    add_rms_norm(pool, x, residual, weight, eps, rows, width, out);                                                 \
  }                                                                                                                 \
  extern "C" void ss_silu_mul_##suffix(Pool* pool, const T* gate_up, long row, long rows, long width, T* out) {     \
    silu_mul(pool, gate_up, row, rows, width, out);                                                                 \
  }                                                                                                                 \
  extern "C" void ss_rope_kv_write_##suffix(Pool* pool, T* q, long q_row, long q_heads, T* k, long k_row,           \
                                            const T* v, long v_row, const float* cos_sin, const KvPool* kv,        \
                                            long layer, const Batch* batch) {                                      \
    rope_kv_write<T>(pool, QkvRows<T>{q, k, v, q_row, k_row, v_row, q_heads}, cos_sin, *kv, layer, *batch);         \
  }

SS_ROWS(f32, float)
SS_ROWS(bf16, bf16)
