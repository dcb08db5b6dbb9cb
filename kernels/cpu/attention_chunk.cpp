// Attention of sequences with several query rows (chunks of prefill), over their blocks in place.
//
// Lanes are query rows: S^T = K Q^T and O^T = V^T P^T, so that the softmax runs down the vectors without crossing
// lanes, and K is read where it lies. The heads of one KV head and neighbouring rows share a block of lanes.
// Online softmax: https://arxiv.org/abs/2205.14135
#include "chunk_lanes.h"
#include "chunk_tiles.h"

namespace {

// This thread's operands of one step: scores and weights of a block, and the values, which all blocks share.
struct Step {
  float* s;     // [kStep][kWide]
  uint32_t* p;  // [kStep / per_dword][kWide] dwords
  uint32_t* v;  // rearranged
};

// The step's weights from its scores; updates max and sum, and scales what o holds.
template <class E>
void soften(const Block& block, const Step& step, long token, int count, float scale, long head_dim) {
  constexpr bool kCoarse = E::per_dword == 2;
  const float factor = kCoarse ? scale * 1.44269504f : scale;
  for (int lane = 0; lane < kWide; lane += W) {
    float* s = step.s + lane;
    uint32_t* p = step.p + lane;
    mask(s, load_as<VI>(block.limit + lane) - (int32_t)token, count);
    const VF before = load(block.max + lane);
    VF tops[4] = {before, before, before, before};
    for (int t = 0; t < kStep; t += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) tops[i] = vmax(tops[i], load(s + (t + i) * kWide));
    const VF top = vmax(vmax(tops[0], tops[1]), vmax(tops[2], tops[3]));
    const VF shift = top * factor, keep = vexp((before - top) * scale);
    VF sums[2] = {};
    if constexpr (kCoarse) {
      for (int t = 0; t < kStep; t += 4)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          const VF a = vexp2_coarse(load(s + (t + 2 * i) * kWide) * factor - shift);
          const VF b = vexp2_coarse(load(s + (t + 2 * i + 1) * kWide) * factor - shift);
          sums[i] += a + b;
          const VU pair = ((as_u(a) + 0x8000u) >> 16) | ((as_u(b) + 0x8000u) & 0xffff0000u);
          store_as(p + (t / 2 + i) * kWide, pair);
        }
    } else {
      for (int t = 0; t < count; t++) {
        const VF a = vexp(load(s + t * kWide) * factor - shift);
        sums[t & 1] += a;
        store_as(p + t * kWide, a);
      }
    }
    store(block.max + lane, top);
    store(block.sum + lane, load(block.sum + lane) * keep + sums[0] + sums[1]);
    if (token == 0 || !any(keep != splat(1.0f))) continue;
    for (long d = 0; d < head_dim; d++) store(block.o + d * kWide + lane, load(block.o + d * kWide + lane) * keep);
  }
}

// Any number of rows, in groups of at most kRows.
template <class E>
void multiply(long rows, const uint32_t* a, long a_row, long a_unit, const uint32_t* b, float* c, long units,
              bool accumulate) {
  const long groups = (rows + kRows - 1) / kRows, most = (rows + groups - 1) / groups;
  for (long r = 0; r < rows; r += most)
    multiply_rows<E, 2>((int)(rows - r < most ? rows - r : most), a + r * a_row, a_row, a_unit, b, kWide,
                        c + r * kWide, kWide, units, accumulate);
}

// Plain dot products: on bfloat16, neighbouring tokens' values are interleaved first.
template <class E>
struct Dots {
  using T = typename E::Element;

  void run(const Tiles16<T>& tiles, Block* block, int blocks, float scale) {
    const long head_dim = tiles.head_dim, last = block[blocks - 1].last;
    uint32_t* memory = static_cast<uint32_t*>(
        scratch(5, (size_t)(kStep * (2 * kWide + head_dim)) * sizeof(uint32_t)));
    const Step step = {reinterpret_cast<float*>(memory), memory + kStep * kWide, memory + 2 * kStep * kWide};
    for (long token = 0; token <= last; token += kStep) {
      const int n = (int)(last + 1 - token < kStep ? last + 1 - token : kStep);
      prepare(step, tiles, token, n);
      for (int b = 0; b < blocks; b++) {
        if (block[b].last < token) continue;
        scores(block[b], step, tiles, token, n);
        soften<E>(block[b], step, token, n, scale, head_dim);
        values(block[b], step, tiles, token, n);
      }
    }
  }

  void prepare(const Step& step, const Tiles16<T>& tiles, long token, int count) {
    if constexpr (E::per_dword == 2)
      for (int t = 0; t < count; t += kSpan) {
        const T* values = tiles.keys(token + t) + tiles.value_offset();
        interleave(values, count - t < kSpan ? count - t : kSpan, tiles.head_dim, step.v + t / 2 * tiles.head_dim);
      }
  }

  void scores(const Block& block, const Step& step, const Tiles16<T>& tiles, long token, int count) {
    const long units = tiles.head_dim / E::per_dword;
    for (int t = 0; t < count; t += kSpan) {
      const uint32_t* keys = reinterpret_cast<const uint32_t*>(tiles.keys(token + t));
      const int n = count - t < kSpan ? count - t : kSpan;
      multiply<E>(n, keys, units, 1, block.q, step.s + t * kWide, units, false);
    }
  }

  void values(const Block& block, const Step& step, const Tiles16<T>& tiles, long token, int count) {
    const long head_dim = tiles.head_dim;
    if constexpr (E::per_dword == 2) {
      multiply<E>(head_dim, step.v, 1, head_dim, step.p, block.o, (count + 1) / 2, token > 0);
    } else {
      for (int t = 0; t < count; t += kSpan) {
        const uint32_t* a = reinterpret_cast<const uint32_t*>(tiles.keys(token + t) + tiles.value_offset());
        const int n = count - t < kSpan ? count - t : kSpan;
        multiply<E>(head_dim, a, 1, head_dim, step.p + t * kWide, block.o, n, token + t > 0);
      }
    }
  }

  static void interleave(const bf16* values, int count, long head_dim, uint32_t* to) {
    for (int t = 0; t < count; t += 2, values += 2 * head_dim, to += head_dim)
      for (long d = 0; d < head_dim; d++)
        to[d] = values[d].bits | (t + 1 < count ? (uint32_t)values[head_dim + d].bits << 16 : 0);
  }
};

// Lanes [first, first + count) of one sequence and KV head; lane = row * group + head in the group.
template <class E, class Method, class T = typename E::Element>
void attend(Method& method, const Tiles16<T>& tiles, const Batch& batch, const Query& query, long sequence, long head,
            long group, long first, int count, T* out) {
  alignas(64) static const uint32_t zeros[256] = {};
  const long head_dim = tiles.head_dim;
  const int blocks = (count + kWide - 1) / kWide;
  Block block[kLanes / kWide];
  alignas(64) float max[kLanes], sum[kLanes];
  alignas(64) int32_t limit[kLanes];
  T* to[kLanes];
  uint32_t* memory = static_cast<uint32_t*>(scratch(4, (size_t)(kLanes * 2 * head_dim) * sizeof(uint32_t)));
  for (int b = 0; b < blocks; b++) {
    float* o = reinterpret_cast<float*>(memory + (kLanes + b * kWide) * head_dim);
    block[b] = {memory + b * kWide * head_dim, o, max + b * kWide, sum + b * kWide, limit + b * kWide, 0};
    const void* rows[kWide];
    for (int i = 0; i < kWide; i++) {
      const int lane = b * kWide + i;
      max[lane] = -INFINITY, sum[lane] = 0, limit[lane] = 0, rows[i] = zeros;
      if (lane >= count) continue;
      const long row = batch.query_start[sequence] + (first + lane) / group, h = head * group + (first + lane) % group;
      rows[i] = static_cast<const T*>(query.data) + row * query.row_stride + h * head_dim;
      limit[lane] = (int32_t)batch.positions[row];
      to[lane] = out + (row * query.heads + h) * head_dim;
      block[b].last = limit[lane];
    }
    pack_queries(rows, head_dim / E::per_dword, block[b].q);
  }
  method.run(tiles, block, blocks, query.scale);
  for (int b = 0; b < blocks; b++)
    write_out(block[b], count - b * kWide < kWide ? count - b * kWide : kWide, head_dim, to + b * kWide);
}

template <class E, class T = typename E::Element>
void chunks(Pool* pool, const Batch& batch, const KvPool& kv, long layer, const Query& query, T* out) {
  const long group = query.heads / kv.kv_heads, sequences = batch.sequences - batch.decodes;
  const int32_t* start = batch.query_start + batch.decodes;
  long* first_block = static_cast<long*>(scratch(0, (sequences + 1) * sizeof(long)));
  first_block[0] = 0;
  for (long s = 0; s < sequences; s++)
    first_block[s + 1] = first_block[s] + ((start[s + 1] - start[s]) * group + kLanes - 1) / kLanes;
  const long blocks = first_block[sequences];
  parallel_for(pool, blocks * kv.kv_heads, [&](long item) {
    const long head = item % kv.kv_heads, block = blocks - 1 - item / kv.kv_heads;  // the longest ones first
    long s = 0;
    while (first_block[s + 1] <= block) s++;
    const long lanes = (start[s + 1] - start[s]) * group, first = (block - first_block[s]) * kLanes;
    const int count = (int)(lanes - first < kLanes ? lanes - first : kLanes);
    const long sequence = batch.decodes + s;
    const Tiles16<T> tiles(kv, batch, sequence, head, layer, 0, batch.context_lens[sequence]);
#if defined(SS_AMX)
    if constexpr (E::per_dword == 2) {
      if (kv.head_dim % 32 == 0) {
        ChunkTiles method;
        attend<E>(method, tiles, batch, query, sequence, head, group, first, count, out);
        return;
      }
    }
#endif
    Dots<E> method;
    attend<E>(method, tiles, batch, query, sequence, head, group, first, count, out);
  });
}

}  // namespace

extern "C" {

// The sequences behind the first `decodes`; out [rows][heads * D].
void ss_chunks_f32(Pool* pool, const Batch* batch, const KvPool* kv, long layer, const float* q, long q_row,
                   long heads, float scale, float* out) {
  chunks<Float32>(pool, *batch, *kv, layer, Query{q, q_row, heads, scale}, out);
}
void ss_chunks_bf16(Pool* pool, const Batch* batch, const KvPool* kv, long layer, const bf16* q, long q_row,
                    long heads, float scale, bf16* out) {
  chunks<Bfloat16>(pool, *batch, *kv, layer, Query{q, q_row, heads, scale}, out);
}
}
