// Lanes of chunk attention: query rows of the heads that share a KV head, in blocks of kWide.
//
// Knows how queries get into lanes, what a lane must not see, and how results leave; not how they are computed.
#pragma once

#include <cmath>

#include "paged.h"
#include "pool.h"

namespace {

constexpr int kWide = 2 * W;          // lanes of a block, computed together
constexpr int kLanes = 512;           // query rows x heads of a work item, in blocks
constexpr int kStep = 64;             // tokens between two updates of the running maximum
static_assert(kLanes % kWide == 0);

// What a block of lanes carries from step to step. Rows of all arrays here are kWide long.
struct Block {
  uint32_t* q;     // [D / per_dword] dwords
  float* o;        // [D] weighted values, not yet divided
  float *max, *sum;  // of the scores before scaling, and of the weights
  int32_t* limit;  // last token that the lane sees
  long last;       // the largest of limit
};

void pack_queries(const void* const* rows, long units, uint32_t* q) {
  for (int lane = 0; lane < kWide; lane += W) {
    long u = 0;
    const uint32_t* from[W];
    for (; u + W <= units; u += W) {
      for (int i = 0; i < W; i++) from[i] = static_cast<const uint32_t*>(rows[lane + i]) + u;
      transpose_dwords(from, q + u * kWide + lane, kWide);
    }
    for (; u < units; u++)
      for (int i = 0; i < W; i++)
        q[u * kWide + lane + i] = load_as<uint32_t>(static_cast<const uint32_t*>(rows[lane + i]) + u);
  }
}

// Scores that a lane must not see, and those behind the last token, become -inf.
void mask(float* s, VI limit, int count) {
  const VF never = splat(-INFINITY);
  if (any(limit < VI{} + (count - 1)))
    for (int t = 0; t < count; t++) {
      const VI hidden = (VI{} + t) > limit;
      store(s + t * kWide, select(hidden, never, load(s + t * kWide)));
    }
  for (int t = count; t < kStep; t++) store(s + t * kWide, never);
}

template <class T>
void write_out(const Block& block, int count, long head_dim, T* const* out) {
  for (int lane = 0; lane < count; lane += W) {
    const VF inverse = 1.0f / load(block.sum + lane);
    for (long d = 0; d < head_dim; d += W) {
      alignas(64) float columns[W][W], rows[W][W];
      const uint32_t* from[W];
      for (int i = 0; i < W; i++) {
        store(columns[i], load(block.o + (d + i) * kWide + lane) * inverse);
        from[i] = reinterpret_cast<const uint32_t*>(columns[i]);
      }
      transpose_dwords(from, reinterpret_cast<uint32_t*>(rows[0]), W);
      for (int i = 0; i < W && lane + i < count; i++) store(out[lane + i] + d, load(rows[i]));
    }
  }
}

}  // namespace
