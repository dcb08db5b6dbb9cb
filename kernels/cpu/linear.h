// Linear layers over packed panels: the part that bfloat16, float32 and int8 weights share.
//
// A panel is 32 outputs, [K / per_dword][32] dwords. One dword is a float or two bfloat16 neighbours in K, so one
// layout serves rows from 1 to thousands, and every instruction set. Without tiles the sum over K has one order,
// whatever the number of rows: a row's result depends on nothing but that row.
#pragma once

#include "amx.h"
#include "pool.h"
#include "simd.h"

constexpr int kPanel = 32;       // output columns that are packed, and computed, together
constexpr long kItemRows = 256;  // rows of a work item

struct PackedLinear {  // mirrored by kernels/cpu/library.py
  const void* weight;   // panels
  const void* bias;     // [n] of the activations' type, or null
  const float* scales;  // [n] of int8 weights, or null
  int64_t n, k;
};

// Panels that one work item computes: what stays in the second-level cache when many blocks of rows pass over
// them, and few enough to balance the threads.
static inline long panels_per_item(long panels, long panel_bytes, long rows, int threads) {
  constexpr long kMost = 1100 << 10;
  long items = threads == 1 ? 1 : threads * 4;
  if (rows > 32 && panels * panel_bytes > items * kMost) items = (panels * panel_bytes + kMost - 1) / kMost;
  return items < panels ? (panels + items - 1) / items : 1;
}

// out[rows][n], columns of one panel, from c[rows][kPanel].
template <class T>
static inline void finish(const float* c, const PackedLinear& layer, long panel, T* out, int rows) {
  const T* bias = static_cast<const T*>(layer.bias);
  const long first = panel * kPanel, columns = layer.n - first < kPanel ? layer.n - first : kPanel;
  for (int r = 0; r < rows; r++, c += kPanel, out += layer.n) {
    long j = 0;
    for (; j + W <= columns; j += W) {
      VF v = load(c + j);
      if (layer.scales) v *= load(layer.scales + first + j);
      if (bias) v += load(bias + first + j);
      store(out + first + j, v);
    }
    for (; j < columns; j++) {
      const float v = layer.scales ? c[j] * layer.scales[first + j] : c[j];
      from_float(bias ? v + to_float(bias[first + j]) : v, out + first + j);
    }
  }
}

template <class E>
static inline void multiply_panel(int rows, const uint32_t* x, long x_row, const uint32_t* b, float* c, long units) {
  if (rows == 1) {
    multiply_block<E, 1, kPanel / W, true>(x, x_row, 1, b, kPanel, c, kPanel, units, false);
    return;
  }
  for (int j = 0; j < kPanel; j += 2 * W)
    multiply_rows<E, 2, true>(rows, x, x_row, 1, b + j, kPanel, c + j, kPanel, units, false);
}

// Panels [first, last), which lie at `panels`, for rows [0, rows) of x: a block of rows stays in the first-level
// cache while the panels pass by it.
template <class E, class T = typename E::Element>
static void multiply_panels(const PackedLinear& layer, const uint32_t* panels, long first, long last, const T* x,
                            long x_row, long rows, T* out) {
  const long units = layer.k / E::per_dword, size = units * kPanel, x_dwords = x_row / E::per_dword;
#if defined(SS_AMX)
  if constexpr (E::per_dword == 2) {
    if (layer.k % 32 == 0) {
      alignas(64) float c[32 * kPanel];
      Tiles tiles;
      for (long r = 0; r < rows; r += 32, x += 32 * x_row, out += 32 * layer.n) {
        const int count = (int)(rows - r < 32 ? rows - r : 32);
        const uint32_t* a = reinterpret_cast<const uint32_t*>(x);
        tiles.set_rows(count);
        for (long p = first; p < last; p++) {
          tiles.multiply<true>(a, a + 16 * x_dwords, x_dwords, panels + (p - first) * size, kPanel, c, kPanel, units,
                               false);
          finish(c, layer, p, out, count);
        }
      }
      return;
    }
  }
#endif
  alignas(64) float c[kRows * kPanel];
  const long blocks = (rows + kRows - 1) / kRows, most = (rows + blocks - 1) / blocks;
  for (long r = 0; r < rows; r += most, x += most * x_row, out += most * layer.n) {
    const int count = (int)(rows - r < most ? rows - r : most);
    for (long p = first; p < last; p++) {
      multiply_panel<E>(count, reinterpret_cast<const uint32_t*>(x), x_dwords, panels + (p - first) * size, c, units);
      finish(c, layer, p, out, count);
    }
  }
}

// Calls f(first panel, last panel, first row, number of rows) for every work item.
template <class F>
static inline void over_panels(Pool* pool, const PackedLinear& layer, long panel_bytes, long rows, F&& f) {
  const long panels = (layer.n + kPanel - 1) / kPanel, spans = (rows + kItemRows - 1) / kItemRows;
  const long group = panels_per_item(panels, panel_bytes, rows, pool_threads(pool));
  parallel_for(pool, (panels + group - 1) / group * spans, [&](long item) {
    const long row = item % spans * kItemRows, first = item / spans * group;
    const long last = first + group < panels ? first + group : panels;
    f(first, last, row, rows - row < kItemRows ? rows - row : kItemRows);
  });
}
