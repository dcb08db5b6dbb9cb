// What the linear kernels share: the packed layer and how its panels are dealt to threads.
#pragma once

#include "amx.h"
#include "pool.h"
#include "simd.h"

constexpr int kPanel = 32;  // output columns that are packed, and computed, together

struct PackedLinear {  // mirrored by kernels/cpu/linear.py
  const void* weight;  // panels
  const void* bias;    // [n] of the activations' type, or null
  const void* scales;  // [n] float32 for int8 weights, else null
  int64_t n, k;
};

// Panels that one work item computes: what stays in the second-level cache when many blocks of rows pass over
// them, and few enough to balance the threads.
static inline long panels_per_item(long panels, long panel_bytes, long rows, int threads) {
  long group = threads == 1 ? panels : panels / (threads * 4);
  if (rows > 32 && group * panel_bytes > 768 << 10) group = (768 << 10) / panel_bytes;
  return group < 1 ? 1 : group;
}
