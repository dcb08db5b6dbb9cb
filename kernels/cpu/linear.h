// Rows by packed panels, for bfloat16, float32 and widened int8 weights, and how that is dealt to threads.
#pragma once

#include "linear_layer.h"
#include "linear_tiles.h"

constexpr long kItemRows = 1024;  // rows of a work item

// Panels that one work item computes: what stays in the second-level cache when many blocks of rows pass over
// them, and few enough to balance the threads.
static inline long panels_per_item(long panels, long panel_bytes, long rows, int threads) {
  constexpr long kMost = 1100 << 10;
  long items = threads == 1 ? 1 : threads * 4;
  if (rows > 32 && panels * panel_bytes > items * kMost) items = (panels * panel_bytes + kMost - 1) / kMost;
  return items < panels ? (panels + items - 1) / items : 1;
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
// cache while the panels pass by it. `first` is even if the layer is gated.
template <class E, class Out, class T = typename E::Element>
static void multiply_panels(const PackedLinear& layer, const uint32_t* panels, long first, long last, const T* x,
                            long x_row, long rows, Out* out) {
  const long units = layer.k / E::per_dword, size = units * kPanel, x_dwords = x_row / E::per_dword;
  const long width = out_width(layer);
#if defined(SS_AMX)
  if constexpr (E::per_dword == 2) {
    if (layer.k % 32 == 0 && rows > kTileRows) return multiply_tiles(layer, panels, first, last, x, x_row, rows, out);
    if (layer.k % 32 == 0) {
      alignas(64) float sums[2][32 * kPanel];
      Tiles tiles;
      tiles.set_rows((int)rows);
      const uint32_t* a = reinterpret_cast<const uint32_t*>(x);
      for (long p = first; p < last; p++) {
        float* c = sums[p & 1];
        tiles.multiply<true>(a, a + 16 * x_dwords, x_dwords, panels + (p - first) * size, kPanel, c, kPanel, units,
                             false);
        if (!layer.gated)
          finish<T>(c, layer, p, out, (int)rows);
        else if (p & 1)
          finish_gated<T>(sums[0], c, layer, p, out, (int)rows);
      }
      return;
    }
  }
#endif
  alignas(64) float sums[2][kRows * kPanel];
  const long blocks = (rows + kRows - 1) / kRows, most = (rows + blocks - 1) / blocks;
  for (long r = 0; r < rows; r += most, x += most * x_row, out += most * width) {
    const int count = (int)(rows - r < most ? rows - r : most);
    for (long p = first; p < last; p++) {
      float* c = sums[p & 1];
      multiply_panel<E>(count, reinterpret_cast<const uint32_t*>(x), x_dwords, panels + (p - first) * size, c, units);
      if (!layer.gated)
        finish<T>(c, layer, p, out, count);
      else if (p & 1)
        finish_gated<T>(sums[0], c, layer, p, out, count);
    }
  }
}

// Calls f(first panel, last panel, first row, number of rows) for every work item.
template <class F>
static inline void over_panels(Pool* pool, const PackedLinear& layer, long panel_bytes, long rows, F&& f) {
  const long panels = (layer.n + kPanel - 1) / kPanel, spans = (rows + kItemRows - 1) / kItemRows;
  long group = panels_per_item(panels, panel_bytes, rows, pool_threads(pool));
  if (layer.gated) group += group & 1;
  parallel_for(pool, (panels + group - 1) / group * spans, [&](long item) {
    const long row = item % spans * kItemRows, first = item / spans * group;
    const long last = first + group < panels ? first + group : panels;
    f(first, last, row, rows - row < kItemRows ? rows - row : kItemRows);
  });
}
