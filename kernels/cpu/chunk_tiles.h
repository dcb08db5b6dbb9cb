// Chunk attention of bfloat16 in tiles of AMX; D a multiple of 32.
//
// Weights are powers of two below a lane's `max`, which may lag behind its largest score: they have float32's range,
// and max is raised only when a step's weights sum up to more than kMost. So no step looks for a maximum but the
// first. Invariant: weights are rounded before they are summed, so they sum up to one.
#pragma once

#include "amx.h"
#include "chunk_lanes.h"

#if defined(SS_AMX)

namespace {

constexpr int kPairs = kStep / 2;
constexpr long kSpanSteps = 16;  // steps whose values are transposed at a time
constexpr float kMost = 0x1p64f;

// 2^x in bfloat16 from x in 256ths above -127, as an exponent and 8 bits of a fraction: what (1 + fraction) is too
// large by, in 256ths, in the middle of each 64th. Standard deviation 0.2 %, that of rounding 2^x to bfloat16 0.17 %.
alignas(64) constexpr int8_t kExcess[64] = {
    0,  1,  2,  4,  4,  6,  7,  8,  9,  10, 10, 12, 12, 13, 14, 15, 15, 16, 17, 17, 18, 18, 19, 19, 20, 20, 20, 21, 21, 21, 21, 21,
    21, 22, 22, 21, 21, 21, 21, 21, 21, 20, 20, 19, 19, 19, 18, 17, 17, 16, 15, 15, 13, 13, 12, 11, 9,  9,  7,  6,  5,  3,  2,  1};

struct Sums {  // of a step's weights
  VF half[2];
  bool too_large() const { return any(~((half[0] < splat(kMost)) & (half[1] < splat(kMost)))); }
};

// Turns scores s [kStep][kWide] into weights p [kPairs][kWide], pairs of tokens. factor: of the scores, to 256ths of
// powers of two.
Sums weigh(const float* s, const float* max, float factor, uint32_t* p) {
  const __m512i excess = _mm512_load_si512(kExcess);
  const __m512i zip = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  const VF shift[2] = {127 * 256 - load(max) * factor, 127 * 256 - load(max + W) * factor};
  Sums sums = {};
  for (int t = 0; t < kPairs; t++, s += 2 * kWide, p += kWide)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const __m512i a = _mm512_cvtps_epi32((__m512)(load(s + h * W) * factor + shift[h]));
      const __m512i b = _mm512_cvtps_epi32((__m512)(load(s + kWide + h * W) * factor + shift[h]));
      const __m512i z = _mm512_shuffle_epi8(_mm512_packus_epi32(a, b), zip);
      const __m512i above = _mm512_maskz_permutexvar_epi8(0x5555555555555555u, _mm512_srli_epi16(z, 2), excess);
      const __m512i both = _mm512_srli_epi16(_mm512_sub_epi16(z, above), 1);
      _mm512_store_si512(p + h * W, both);
      sums.half[h] = (VF)_mm512_dpbf16_ps((__m512)sums.half[h], (__m512bh)both, ones);
    }
  return sums;
}

class ChunkTiles {
 public:
  ChunkTiles() { tiles_.set_rows(32); }

  void run(const Tiles16<bf16>& tiles, Block* blocks, int count, float scale) {
    const long head_dim = tiles.head_dim, last = blocks[count - 1].last;
    memory_ = static_cast<uint32_t*>(
        scratch(5, (size_t)(2 * kStep * kWide + kSpanSteps * kPairs * head_dim) * sizeof(uint32_t)));
    uint32_t* values = memory_ + 2 * kStep * kWide;
    for (long token = 0; token <= last; token += kSpanSteps * kStep) {
      const long end = last + 1 - token < kSpanSteps * kStep ? last + 1 : token + kSpanSteps * kStep;
      for (long t = token; t < end; t += 32)
        transpose(tiles, t, (int)(end - t), values + (t - token) / kStep * kPairs * head_dim + (t - token) % kStep / 2);
      for (int b = 0; b < count; b++)
        if (blocks[b].last >= token)
          attend(tiles, blocks[b], token, blocks[b].last < end ? blocks[b].last + 1 : end, values,
                 scale * 1.44269504f * 256);
    }
  }

 private:
  // One block over the tokens [begin, end) of a span.
  void attend(const Tiles16<bf16>& tiles, Block& block, long begin, long end, const uint32_t* values, float factor) {
    float* scores = reinterpret_cast<float*>(memory_);
    uint32_t* weights = memory_ + kStep * kWide;
    for (long token = begin; token < end; token += kStep, values += kPairs * tiles.head_dim) {
      const int count = (int)(end - token < kStep ? end - token : kStep);
      multiply_keys(tiles, block, token, count, scores);
      for (int h = 0; h < kWide; h += W) {
        mask(scores + h, load_as<VI>(block.limit + h) - (int32_t)token, count);
        if (token == 0) store(block.max + h, max_score(scores, h, load(block.max + h)));
      }
      Sums sums = weigh(scores, block.max, factor, weights);
      if (sums.too_large()) [[unlikely]] {
        raise_max(block, scores, factor, tiles.head_dim);
        sums = weigh(scores, block.max, factor, weights);
      }
      for (int h = 0; h < 2; h++) store(block.sum + h * W, load(block.sum + h * W) + sums.half[h]);
      multiply_values(tiles.head_dim, block, values, weights, count, token > 0);
    }
  }

  static VF max_score(const float* s, int lane, VF top) {
    for (int t = 0; t < kStep; t++) top = vmax(top, load(s + t * kWide + lane));
    return top;
  }

  // Takes the maximum from scores that come next, and scales what was summed.
  [[gnu::noinline]] static void raise_max(Block& block, const float* s, float factor, long head_dim) {
    for (int lane = 0; lane < kWide; lane += W) {
      const VF old = load(block.max + lane), top = max_score(s, lane, old);
      const VF keep = vexp2_coarse((old - top) * (factor / 256));
      store(block.max + lane, top);
      store(block.sum + lane, load(block.sum + lane) * keep);
      for (long d = 0; d < head_dim; d++) store(block.o + d * kWide + lane, load(block.o + d * kWide + lane) * keep);
    }
  }

  // s[kStep][kWide] = keys * queries of the `count` tokens from `token` on.
  static inline void multiply_keys(const Tiles16<bf16>& tiles, const Block& block, long token, int count, float* s) {
    const long row = tiles.head_dim * 2;
    for (int t = 0; t < count; t += 2 * kSpan, s += 2 * kSpan * kWide) {
      const bf16* upper = tiles.keys(token + t);
      const bf16* lower = t + kSpan < count ? tiles.keys(token + t + kSpan) : upper;  // garbage that is masked
      multiply(reinterpret_cast<const uint32_t*>(upper), reinterpret_cast<const uint32_t*>(lower), row, block.q, s,
               tiles.head_dim / 2, false);
    }
  }

  // o (+)= values * weights of a step.
  static inline void multiply_values(long head_dim, const Block& block, const uint32_t* values, const uint32_t* p,
                                     int count, bool accumulate) {
    asm volatile("" ::: "memory");  // the weights are stored
    for (long d = 0; d < head_dim; d += 32, values += 32 * kPairs)
      multiply(values, values + 16 * kPairs, kPairs * 4, p, block.o + d * kWide, count > 32 ? kPairs : kPairs / 2,
               accumulate);
  }

  // c[32][kWide] (+)= a[32][units] * b[units][kWide]
  static inline void multiply(const uint32_t* upper, const uint32_t* lower, long a_bytes, const uint32_t* b, float* c,
                              long units, bool accumulate) {
    constexpr long kBytes = kWide * 4;
    if (accumulate) {
      _tile_loadd(0, c, kBytes);
      _tile_loadd(1, c + 16, kBytes);
      _tile_loadd(2, c + 16 * kWide, kBytes);
      _tile_loadd(3, c + 16 * kWide + 16, kBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (long u = 0; u < units; u += 16) {
      _tile_loadd(6, b + u * kWide, kBytes);
      _tile_stream_loadd(4, upper + u, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + u * kWide + 16, kBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, lower + u, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, kBytes);
    _tile_stored(1, c + 16, kBytes);
    _tile_stored(2, c + 16 * kWide, kBytes);
    _tile_stored(3, c + 16 * kWide + 16, kBytes);
  }

  // to[d][16 pairs of tokens], rows kPairs dwords apart; zeros for tokens from `count` on.
  static void transpose(const Tiles16<bf16>& tiles, long token, int count, uint32_t* to) {
    for (long d = 0; d < tiles.head_dim; d += 32) {
      alignas(64) uint32_t low[16][16], high[16][16], turned[16][16];
      const uint32_t *lows[16], *highs[16];
      for (int i = 0; i < 16; i++) {
        __m512i a = {}, b = {};
        if (2 * i < count) {
          const bf16* span = tiles.keys(token + 2 * i / kSpan * kSpan) + tiles.value_offset();
          const bf16* at = span + 2 * i % kSpan * tiles.head_dim + d;
          a = _mm512_loadu_si512(at);
          if (2 * i + 1 < count) b = _mm512_loadu_si512(at + tiles.head_dim);
        }
        _mm512_store_si512(low[i], _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(high[i], _mm512_unpackhi_epi16(a, b));
        lows[i] = low[i], highs[i] = high[i];
      }
      // Lane 4k + j of `low` is value 8k + j of the 32, of `high` value 8k + 4 + j.
      for (int half = 0; half < 2; half++) {
        transpose_dwords(half ? highs : lows, turned[0], 16);
        for (int i = 0; i < 16; i++)
          _mm512_storeu_si512(to + (d + i / 4 * 8 + half * 4 + i % 4) * kPairs, _mm512_load_si512(turned[i]));
      }
    }
  }

  Tiles tiles_;
  uint32_t* memory_ = nullptr;  // scores and weights of a step, then values
};

}  // namespace

#endif
