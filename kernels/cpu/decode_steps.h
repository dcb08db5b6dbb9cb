// Scores and weighted values of one step of tokens, for the query heads that share a KV head.
//
// Three ways: vectors along D (any instruction set), bfloat16 dot products, and tiles.
#pragma once

#include "amx.h"
#include "paged.h"

constexpr int kStep = 64;  // tokens of a step; rows of scores and weights are so long
// Whoever reads a line of V first also fetches the line that lies so many tokens further; lines of K are fetched
// between the steps' exponentials, since a core waits if it has more than some 16 on their way.
constexpr int kAhead = kStep;

namespace {

#if defined(SS_AVX512BF16)

template <bool kFull = false>
static inline __m512bh load_pairs(const bf16* p, long left) {  // up to 32 values
  if (kFull || left >= 32) return (__m512bh)_mm512_loadu_si512(p);
  return (__m512bh)_mm512_maskz_loadu_epi16(0xffffu, p);
}

// Lane i of the result is the sum of the lanes of rows[i].
static inline __m512 sum_rows(const __m512* rows) {
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
    long d = 0;
    for (; d + 32 <= head_dim; d += 32) {
      const __m512bh query = load_pairs<true>(q[g] + d, 32);
#pragma GCC unroll 16
      for (int t = 0; t < kSpan; t++) {
        sums[t] = _mm512_dpbf16_ps(sums[t], load_pairs<true>(keys + t * head_dim + d, 32), query);
      }
    }
    if (d < head_dim) {
      const __m512bh query = load_pairs(q[g] + d, 16);
#pragma GCC unroll 16
      for (int t = 0; t < kSpan; t++)
        sums[t] = _mm512_dpbf16_ps(sums[t], load_pairs(keys + t * head_dim + d, 16), query);
    }
    _mm512_storeu_ps(scores + g * kStep, sum_rows(sums));
  }
}

// to[0..31] += sums over interleaved values: lane 4k + j of `low` belongs to 8k + j, of `high` to 8k + 4 + j.
static inline void add_in_order(__m512 low, __m512 high, long left, float* to) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_permutex2var_ps(low, first, high)));
  if (left < 32) return;
  _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), _mm512_permutex2var_ps(low, second, high)));
}

// out[g][D] += weights[g][count] * values: two tokens at a time, weights rounded to bfloat16.
template <int G>
void add_values(const Tiles16<bf16>& tiles, long token, int count, const float* weights, float* out) {
  const long head_dim = tiles.head_dim;
  alignas(64) bf16 rounded[G][kStep];
  for (int g = 0; g < G; g++)
    for (int t = 0; t < kStep; t += W) store(rounded[g] + t, load(weights + g * kStep + t));
  for (long d = 0; d < head_dim; d += 32) {
    const long left = head_dim - d;
    __m512 sum[G][2];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) sum[g][0] = sum[g][1] = _mm512_setzero_ps();
    for (int t = 0; t < count; t += kSpan) {
      const bf16* values = tiles.keys(token + t) + tiles.value_offset() + d;
      const bf16* ahead = tiles.keys_ahead(token + t, kAhead) + tiles.value_offset() + d;
      const int n = count - t < kSpan ? count - t : kSpan;
      for (int i = 0; i < n; i += 2) {
        prefetch(ahead + i * head_dim);
        prefetch(ahead + (i + 1) * head_dim);
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
      add_in_order(sum[g][0], sum[g][1], left, out + g * head_dim + d);
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
    const T* ahead = tiles.keys_ahead(token + t, kAhead) + tiles.value_offset() + d;
    const int n = count - t < kSpan ? count - t : kSpan;
    for (int i = 0; i < n; i++, values += tiles.head_dim, ahead += tiles.head_dim) {
      VF value[NV];
      for (int j = 0; j < NV; j++) value[j] = load(values + j * W), prefetch(ahead + j * W);
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

// G query heads by dot products.
template <int G, class T>
struct DotHeads {
  const T* const* q;  // [G][D]
  static constexpr int heads = G;

  void scores(const Tiles16<T>& tiles, long token, int count, float* scores) const {
    for (int t = 0; t < count; t += kSpan)
      score_span<G>(q, tiles.keys(token + t), tiles.head_dim, count - t < kSpan ? count - t : kSpan, scores + t);
  }
  void values(const Tiles16<T>& tiles, long token, int count, const float* weights, float* out) const {
    add_values<G>(tiles, token, count, weights, out);
  }
};

#if defined(SS_AMX)
// Up to 16 query heads in tiles; D a multiple of 32, at most 256.
struct TileHeads {
  int heads;
  Tiles tiles_;
  alignas(64) uint32_t q_[128][16];          // [D / 2] dwords of 16 heads, those that are not there zero
  alignas(64) bf16 weights_[16][kStep];      // of 16 heads
  alignas(64) uint32_t values_[kStep / 2][256];  // [pairs of tokens][D] dwords, interleaved

  TileHeads(const bf16* const* q, int count, long head_dim) : heads(count) {
    alignas(64) static const uint32_t zeros[256] = {};
    const uint32_t* rows[16];
    tiles_.set_rows(32);
    for (long u = 0; u < head_dim / 2; u += 16) {
      for (int g = 0; g < 16; g++) rows[g] = (g < count ? reinterpret_cast<const uint32_t*>(q[g]) : zeros) + u;
      transpose_dwords(rows, q_[u], 16);
    }
    std::memset(weights_, 0, sizeof weights_);
  }

  void scores(const Tiles16<bf16>& tiles, long token, int count, float* scores) {
    const long stride = tiles.head_dim * 2;
    const bf16* keys[4];
    for (int i = 0; i < 4; i++) keys[i] = tiles.keys(token + (i * kSpan < count ? i * kSpan : 0));
    alignas(64) float sums[kStep][16];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long d = 0; d < tiles.head_dim; d += 32) {
      _tile_loadd(6, q_[d / 2], 64);
      _tile_loadd(4, keys[0] + d, stride);
      _tile_dpbf16ps(0, 4, 6);
      if (count <= kSpan) continue;
      _tile_loadd(5, keys[1] + d, stride);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, keys[2] + d, stride);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, keys[3] + d, stride);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[16], 64);
    _tile_stored(2, sums[32], 64);
    _tile_stored(3, sums[48], 64);
    const __m512i rows = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    for (int g = 0; g < heads; g++)
      for (int t = 0; t < kStep; t += 16)
        _mm512_storeu_ps(scores + g * kStep + t, _mm512_i32gather_ps(rows, sums[t] + g, 4));
  }

  void values(const Tiles16<bf16>& tiles, long token, int count, const float* weights, float* out) {
    for (int g = 0; g < heads; g++)
      for (int t = 0; t < kStep; t += 16) store(weights_[g] + t, load(weights + g * kStep + t));
    const int padded = count > 32 ? 64 : 32;
    for (int t = 0; t < padded; t += 2) interleave(tiles, token + t, count - t, values_[t / 2]);
    for (long d = 0; d < tiles.head_dim; d += 32) {
      alignas(64) float sums[2][16][16];
      _tile_zero(0);
      _tile_zero(1);
      for (int t = 0; t < padded; t += 32) {
        _tile_loadd(4, weights_[0] + t, kStep * 2);
        _tile_loadd(6, values_[t / 2] + d, sizeof values_[0]);
        _tile_loadd(7, values_[t / 2] + d + 16, sizeof values_[0]);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      for (int g = 0; g < heads; g++)
        add_in_order(_mm512_load_ps(sums[0][g]), _mm512_load_ps(sums[1][g]), 32, out + g * tiles.head_dim + d);
    }
  }

  // Two tokens' values, zeros for those that are not there.
  static void interleave(const Tiles16<bf16>& tiles, long token, int left, uint32_t* to) {
    const long head_dim = tiles.head_dim;
    const long span = token / kSpan * kSpan, inside = tiles.value_offset() + token % kSpan * head_dim;
    const bf16 *at = nullptr, *ahead = nullptr;
    if (left > 0) at = tiles.keys(span) + inside, ahead = tiles.keys_ahead(span, kAhead) + inside;
    for (long d = 0; d < head_dim; d += 32) {
      prefetch(ahead + d);
      prefetch(ahead + head_dim + d);
      const __m512i a = left > 0 ? _mm512_loadu_si512(at + d) : __m512i{};
      const __m512i b = left > 1 ? _mm512_loadu_si512(at + head_dim + d) : __m512i{};
      _mm512_store_si512(to + d, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + d + 16, _mm512_unpackhi_epi16(a, b));
    }
  }
};
#endif

}  // namespace
