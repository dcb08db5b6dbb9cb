// Attention of sequences with one query row each, over their blocks in place.
//
// The query heads of one KV head share every load of K and V. A context is cut into parts of kPart tokens,
// whatever the number of threads, and the parts are merged in order: a result depends on its sequence alone.
// Flash-decoding: https://crfm.stanford.edu/2023/10/12/flashdecoding.html
#include <cmath>

#include "paged.h"
#include "pool.h"

namespace {

constexpr int kPart = 512;  // tokens of a work item
constexpr int kStep = 64;   // tokens between two updates of the running maximum
constexpr int kAhead = 4 * kSpan;
constexpr int kHeads = 4;  // query heads that are computed together

template <class T>
void prefetch_tile(const T* tile, long elements) {
  for (long i = 0; i < elements; i += 64 / (long)sizeof(T)) prefetch(tile + i);
}

#if defined(SS_AVX512BF16)

inline __m512bh load_pairs(const bf16* p, long left) {  // up to 32 values
  const __mmask32 mask = left >= 32 ? 0xffffffffu : 0xffffu;
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
}

// Lane i of the result is the sum of the lanes of rows[i].
inline __m512 sum_rows(const __m512* rows) {
  __m512 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512 *r = rows + 4 * i;
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
    __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// scores[g][0..15] of one span; those past its valid tokens are garbage.
template <int G>
void score_span(const bf16* const* q, const bf16* keys, long head_dim, int, float* scores) {
  for (int g = 0; g < G; g++) {
    __m512 sums[kSpan];
#pragma GCC unroll 16
    for (int t = 0; t < kSpan; t++) sums[t] = _mm512_setzero_ps();
    for (long d = 0; d < head_dim; d += 32) {
      const __m512bh query = load_pairs(q[g] + d, head_dim - d);
#pragma GCC unroll 16
      for (int t = 0; t < kSpan; t++)
        sums[t] = _mm512_dpbf16_ps(sums[t], load_pairs(keys + t * head_dim + d, head_dim - d), query);
    }
    _mm512_storeu_ps(scores + g * kStep, sum_rows(sums));
  }
}

// out[g][D] += weights[g][count] * values: two tokens at a time, weights rounded to bfloat16.
template <int G>
void add_values(const Tiles16<bf16>& tiles, long token, int count, const float* weights, float* out) {
  const long head_dim = tiles.head_dim;
  alignas(64) bf16 rounded[G][kStep];
  for (int g = 0; g < G; g++)
    for (int t = 0; t < kStep; t += W) store(rounded[g] + t, load(weights + g * kStep + t));
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (long d = 0; d < head_dim; d += 32) {
    const long left = head_dim - d;
    __m512 sum[G][2];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) sum[g][0] = sum[g][1] = _mm512_setzero_ps();
    for (int t = 0; t < count; t += kSpan) {
      const bf16* values = tiles.keys(token + t) + tiles.value_offset() + d;
      const int n = count - t < kSpan ? count - t : kSpan;
      for (int i = 0; i < n; i += 2) {
        const __m512i a = (__m512i)load_pairs(values + i * head_dim, left);
        const __m512i b = i + 1 < n ? (__m512i)load_pairs(values + (i + 1) * head_dim, left) : __m512i{};
        const __m512bh lo = (__m512bh)_mm512_unpacklo_epi16(a, b), hi = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
          const __m512bh w = (__m512bh)_mm512_set1_epi32(load_as<int>(&rounded[g][t + i]));
          sum[g][0] = _mm512_dpbf16_ps(sum[g][0], lo, w);
          sum[g][1] = _mm512_dpbf16_ps(sum[g][1], hi, w);
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      float* to = out + g * head_dim + d;
      const __m512 first = _mm512_permutex2var_ps(sum[g][0], low, sum[g][1]);
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), first));
      if (left < 32) continue;
      const __m512 second = _mm512_permutex2var_ps(sum[g][0], high, sum[g][1]);
      _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), second));
    }
  }
}

#endif

template <int G, class T>
void score_span(const T* const* q, const T* keys, long head_dim, int count, float* scores) {
  for (int t = 0; t < count; t++, keys += head_dim) {
    VF sum[G] = {};
    for (long d = 0; d < head_dim; d += W) {
      const VF key = load(keys + d);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) sum[g] += key * load(q[g] + d);
    }
    for (int g = 0; g < G; g++) scores[g * kStep + t] = sum_lanes(sum[g]);
  }
}

template <int G, int NV, class T>
void add_value_columns(const Tiles16<T>& tiles, long token, int count, const float* weights, float* out, long d) {
  VF sum[G][NV] = {};
  for (int t = 0; t < count; t += kSpan) {
    const T* values = tiles.keys(token + t) + tiles.value_offset() + d;
    const int n = count - t < kSpan ? count - t : kSpan;
    for (int i = 0; i < n; i++, values += tiles.head_dim) {
      VF value[NV];
      for (int j = 0; j < NV; j++) value[j] = load(values + j * W);
      for (int g = 0; g < G; g++)
        for (int j = 0; j < NV; j++) sum[g][j] += value[j] * weights[g * kStep + t + i];
    }
  }
  for (int g = 0; g < G; g++)
    for (int j = 0; j < NV; j++) {
      float* to = out + g * tiles.head_dim + d + j * W;
      store(to, load(to) + sum[g][j]);
    }
}

template <int G, class T>
void add_values(const Tiles16<T>& tiles, long token, int count, const float* weights, float* out) {
  constexpr int kWide = W == 16 ? 4 : 2;
  long d = 0;
  for (; d + kWide * W <= tiles.head_dim; d += kWide * W)
    add_value_columns<G, kWide>(tiles, token, count, weights, out, d);
  for (; d < tiles.head_dim; d += W) add_value_columns<G, 1>(tiles, token, count, weights, out, d);
}

struct Partial {
  float* max;  // [heads of a KV head]
  float* sum;
  float* out;  // [heads of a KV head][D], not yet divided by sum
};

// Softmax-weighted values of tokens [begin, end) for G query heads.
template <int G, class T>
void attend_part(const T* const* q, const Tiles16<T>& tiles, long begin, long end, long last, float scale,
                 Partial part) {
  const long head_dim = tiles.head_dim, tile = kSpan * head_dim;
  alignas(64) float scores[G * kStep];
  for (int g = 0; g < G; g++) part.max[g] = -INFINITY, part.sum[g] = 0;
  for (long i = 0; i < G * head_dim; i++) part.out[i] = 0;
  for (long token = begin; token < end; token += kStep) {
    const int count = (int)(end - token < kStep ? end - token : kStep);
    for (int t = 0; t < count; t += kSpan) {
      if (token + t + kAhead < last) {
        const T* next = tiles.keys(token + t + kAhead);
        prefetch_tile(next, tile);
        prefetch_tile(next + tiles.value_offset(), tile);
      }
      const int n = count - t < kSpan ? count - t : kSpan;
      score_span<G>(q, tiles.keys(token + t), head_dim, n, scores + t);
    }
    for (int g = 0; g < G; g++) {
      float* row = scores + g * kStep;
      for (int t = count; t < kStep; t++) row[t] = -INFINITY;
      VF best = load(row) * scale;
      for (int t = 0; t < kStep; t += W) {
        const VF s = load(row + t) * scale;
        store(row + t, s);
        best = vmax(best, s);
      }
      const float top = std::fmax(max_lanes(best), part.max[g]);
      const float keep = vexp(splat(part.max[g] - top))[0];
      VF sum = {};
      for (int t = 0; t < kStep; t += W) {
        const VF weight = vexp(load(row + t) - top);
        store(row + t, weight);
        sum += weight;
      }
      part.sum[g] = part.sum[g] * keep + sum_lanes(sum);
      part.max[g] = top;
      if (keep != 1.0f)
        for (long d = 0; d < head_dim; d += W) {
          float* to = part.out + g * head_dim + d;
          store(to, load(to) * keep);
        }
    }
    add_values<G>(tiles, token, count, scores, part.out);
  }
}

template <class T>
void attend_heads(int heads, const T* const* q, const Tiles16<T>& tiles, long begin, long end, long last,
                  float scale, Partial part) {
  switch (heads) {
    case 1: return attend_part<1>(q, tiles, begin, end, last, scale, part);
    case 2: return attend_part<2>(q, tiles, begin, end, last, scale, part);
    case 3: return attend_part<3>(q, tiles, begin, end, last, scale, part);
    default: return attend_part<4>(q, tiles, begin, end, last, scale, part);
  }
}

// Adds the parts of one head up, in order, and divides.
template <class T>
void merge(const Partial* parts, long count, int head, long head_dim, T* out) {
  float top = -INFINITY, sum = 0;
  for (long p = 0; p < count; p++) top = std::fmax(top, parts[p].max[head]);
  alignas(64) float total[256] = {};
  for (long p = 0; p < count; p++) {
    const float weight = vexp(splat(parts[p].max[head] - top))[0];
    const float* from = parts[p].out + head * head_dim;
    sum += parts[p].sum[head] * weight;
    for (long d = 0; d < head_dim; d += W) store(total + d, load(total + d) + load(from + d) * weight);
  }
  const float inverse = 1.0f / sum;
  for (long d = 0; d < head_dim; d += W) store(out + d, load(total + d) * inverse);
}

template <class T>
void decode(Pool* pool, const Batch& batch, const KvPool& kv, long layer, const Query& query, T* out) {
  const long head_dim = kv.head_dim, group = query.heads / kv.kv_heads, floats = group * (head_dim + 2);
  long* first_part = static_cast<long*>(scratch(0, (batch.decodes + 1) * sizeof(long)));
  first_part[0] = 0;
  for (long s = 0; s < batch.decodes; s++)
    first_part[s + 1] = first_part[s] + (batch.context_lens[s] + kPart - 1) / kPart;
  const long parts = first_part[batch.decodes], items = parts * kv.kv_heads;
  int32_t* owner = static_cast<int32_t*>(scratch(1, parts * sizeof(int32_t)));
  for (long s = 0; s < batch.decodes; s++)
    for (long p = first_part[s]; p < first_part[s + 1]; p++) owner[p] = (int32_t)s;
  float* partials = static_cast<float*>(scratch(2, items * floats * sizeof(float)));
  const auto partial = [=](long part, long head) {
    float* at = partials + (head * parts + part) * floats;
    return Partial{at, at + group, at + 2 * group};
  };
  parallel_for(pool, items, [&](long item) {
    const long head = item / parts, part = item % parts, s = owner[part];
    const long begin = (part - first_part[s]) * kPart, context = batch.context_lens[s];
    const long end = begin + kPart < context ? begin + kPart : context;
    const Tiles16<T> tiles(kv, batch, s, head, layer);
    const T* q = static_cast<const T*>(query.data) + batch.query_start[s] * query.row_stride + head * group * head_dim;
    Partial at = partial(part, head);
    for (long g = 0; g < group; g += kHeads) {
      const int heads = (int)(group - g < kHeads ? group - g : kHeads);
      const T* rows[kHeads];
      for (int i = 0; i < heads; i++) rows[i] = q + (g + i) * head_dim;
      attend_heads(heads, rows, tiles, begin, end, context, query.scale,
                   Partial{at.max + g, at.sum + g, at.out + g * head_dim});
    }
  });
  parallel_for(pool_threads(pool) > 1 && batch.decodes > 16 ? pool : nullptr, batch.decodes, [&](long s) {
    Partial mine[64];
    for (long head = 0; head < kv.kv_heads; head++) {
      const long count = first_part[s + 1] - first_part[s];
      Partial* list = count <= 64 ? mine : static_cast<Partial*>(scratch(3, count * sizeof(Partial)));
      for (long p = 0; p < count; p++) list[p] = partial(first_part[s] + p, head);
      for (long g = 0; g < group; g++)
        merge(list, count, (int)g, head_dim, out + (batch.query_start[s] * query.heads + head * group + g) * head_dim);
    }
  });
}

}  // namespace

extern "C" {

// The first `decodes` sequences of the batch; out [rows][heads * D].
void ss_decode_f32(Pool* pool, const Batch* batch, const KvPool* kv, long layer, const float* q, long q_row,
                   long heads, float scale, float* out) {
  decode<float>(pool, *batch, *kv, layer, Query{q, q_row, heads, scale}, out);
}
void ss_decode_bf16(Pool* pool, const Batch* batch, const KvPool* kv, long layer, const bf16* q, long q_row,
                    long heads, float scale, bf16* out) {
  decode<bf16>(pool, *batch, *kv, layer, Query{q, q_row, heads, scale}, out);
}
}
