// Attention of sequences with one query row each, over their blocks in place.
//
// The query heads of one KV head share every load of K and V. A context is cut into parts of kPart tokens,
// whatever the number of threads, and the parts are merged in order: a result depends on its sequence alone.
// Flash-decoding: https://crfm.stanford.edu/2023/10/12/flashdecoding.html
#include <cmath>

#include "decode_steps.h"
#include "pool.h"

namespace {

constexpr int kPart = 512;  // tokens of a work item
constexpr int kPartsEach = 4;  // so many of them for each thread are enough to share the work evenly
constexpr int kHeads = 16;  // query heads that are computed together

struct Partial {
  float* max;  // [heads of a KV head]
  float* sum;
  float* out;  // [heads of a KV head][D], not yet divided by sum
};

// Softmax-weighted values of the tokens of `tiles`, kStep at a time.
template <class Method, class T>
void attend_part(Method& method, const Tiles16<T>& tiles, float scale, Partial part) {
  const long head_dim = tiles.head_dim;
  const long share = (kSpan * head_dim * (long)sizeof(T) / 64 - 1) / (method.heads * (kSpan / W)) + 1;
  alignas(64) float scores[16 * kStep];
  for (int g = 0; g < method.heads; g++) part.max[g] = -INFINITY, part.sum[g] = 0;
  for (long i = 0; i < method.heads * head_dim; i++) part.out[i] = 0;
  for (long token = tiles.begin; token < tiles.end; token += kStep) {
    const int count = (int)(tiles.end - token < kStep ? tiles.end - token : kStep);
    method.scores(tiles, token, count, scores);
    const char* ahead[kStep / kSpan];
    for (int i = 0; i < kStep / kSpan; i++)
      ahead[i] = reinterpret_cast<const char*>(tiles.keys_ahead(token + i * kSpan, kAhead));
    for (int g = 0; g < method.heads; g++) {
      float* row = scores + g * kStep;
      for (int t = count; t < kStep; t++) row[t] = -INFINITY;
      VF best = load(row) * scale;
      for (int t = 0; t < kStep; t += W) {
        const VF s = load(row + t) * scale;
        store(row + t, s);
        best = vmax(best, s);
      }
      const float top = std::fmax(max_lanes(best), part.max[g]);
      VF sum = {};
      for (int t = 0; t < kStep; t += W) {
        const VF weight = vexp(load(row + t) - top);
        store(row + t, weight);
        sum += weight;
        const char* lines = ahead[t / kSpan] + (g * (kSpan / W) + t % kSpan / W) * share * 64;
        for (long i = 0; i < share; i++) prefetch(lines + i * 64);
      }
      if (top != part.max[g]) {
        const float keep = vexp(splat(part.max[g] - top))[0];
        part.max[g] = top;
        part.sum[g] *= keep;
        for (long d = 0; d < head_dim; d += W) {
          float* to = part.out + g * head_dim + d;
          store(to, load(to) * keep);
        }
      }
      part.sum[g] += sum_lanes(sum);
    }
    method.values(tiles, token, count, scores, part.out);
  }
}

template <int G, class T>
void attend_dots(const T* const* q, const Tiles16<T>& tiles, float scale, Partial part) {
  DotHeads<G, T> method{q};
  attend_part(method, tiles, scale, part);
}

template <class T>
void attend_heads(int heads, const T* const* q, const Tiles16<T>& tiles, float scale, Partial part) {
#if defined(SS_AMX)
  if constexpr (sizeof(T) == 2)
    // Dots start sooner, tiles go faster.
    if ((heads > 3 || tiles.end - tiles.begin > kStep) && tiles.head_dim % 32 == 0) {
      TileHeads method(q, heads, tiles.head_dim);
      return attend_part(method, tiles, scale, part);
    }
#endif
  for (int first = 0; first < heads; first += 4, q += 4) {
    switch (heads - first) {
      case 1: attend_dots<1>(q, tiles, scale, part); break;
      case 2: attend_dots<2>(q, tiles, scale, part); break;
      case 3: attend_dots<3>(q, tiles, scale, part); break;
      default: attend_dots<4>(q, tiles, scale, part);
    }
    part = {part.max + 4, part.sum + 4, part.out + 4 * tiles.head_dim};
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
  const auto attend = [&](long part, long head, bool more) {
    const long s = owner[part], begin = (part - first_part[s]) * kPart, context = batch.context_lens[s];
    Tiles16<T> tiles(kv, batch, s, head, layer, begin, begin + kPart < context ? begin + kPart : context);
    if (more) tiles.next = kv.head_stride;
    const T* q = static_cast<const T*>(query.data) + batch.query_start[s] * query.row_stride + head * group * head_dim;
    Partial at = partial(part, head);
    for (long g = 0; g < group; g += kHeads) {
      const int heads = (int)(group - g < kHeads ? group - g : kHeads);
      const T* rows[kHeads];
      for (int i = 0; i < heads; i++) rows[i] = q + (g + i) * head_dim;
      attend_heads(heads, rows, tiles, query.scale, Partial{at.max + g, at.sum + g, at.out + g * head_dim});
    }
  };
  if (parts >= kPartsEach * pool_threads(pool))  // one item for all heads: what the next one begins with is fetched
    parallel_for(pool, parts, [&](long part) {
      for (long head = 0; head < kv.kv_heads; head++) attend(part, head, head + 1 < kv.kv_heads);
    });
  else
    parallel_for(pool, items, [&](long item) { attend(item % parts, item / parts, false); });
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
