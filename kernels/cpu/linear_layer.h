// A linear layer's panels, and how the sums over K become its outputs.
//
// A panel is 32 outputs, [K / per_dword][32] dwords. One dword is a float or two bfloat16 neighbours in K, so one
// layout serves rows from 1 to thousands, and every instruction set. Without tiles the sum over K has one order,
// whatever the number of rows: a row's result depends on nothing but that row.
#pragma once

#include "amx.h"
#include "pool.h"
#include "simd.h"

constexpr int kPanel = 32;       // output columns that are packed, and computed, together

struct PackedLinear {  // mirrored by kernels/cpu/library.py
  const void* weight;   // panels
  const void* bias;     // [n] of the activations' type, or null
  const float* scales;  // [n] of int8 weights, or null
  int64_t n, k;
  int64_t gated;  // 1: even panels are gates, odd ones the ups that belong to them, and silu(gate) * up comes out
};

// Sums of W columns from `column` on, scaled and with their bias.
template <class T>
static inline VF finished(const float* c, const PackedLinear& layer, long column) {
  VF v = load(c);
  if (layer.scales) v *= load(layer.scales + column);
  if (layer.bias) v += load(static_cast<const T*>(layer.bias) + column);
  return v;
}

// out[rows][n], columns of one panel, from c[rows][kPanel]; T is the activations' type.
template <class T, class Out>
static inline void finish(const float* c, const PackedLinear& layer, long panel, Out* out, int rows) {
  const T* bias = static_cast<const T*>(layer.bias);
  const long first = panel * kPanel, columns = layer.n - first < kPanel ? layer.n - first : kPanel;
  if (columns == kPanel && !layer.scales && !bias) {
    for (int r = 0; r < rows; r++, c += kPanel, out += layer.n)
      for (long j = 0; j < kPanel; j += 2 * W) store_two(out + first + j, load(c + j), load(c + j + W));
    return;
  }
  for (int r = 0; r < rows; r++, c += kPanel, out += layer.n) {
    long j = 0;
    for (; j + W <= columns; j += W) store(out + first + j, finished<T>(c + j, layer, first + j));
    for (; j < columns; j++) {
      const float v = layer.scales ? c[j] * layer.scales[first + j] : c[j];
      from_float(bias ? v + to_float(bias[first + j]) : v, out + first + j);
    }
  }
}

// out[rows][n / 2]: silu(gate) * up, from the sums of a panel of gates and the panel of ups behind it.
template <class T, class Out>
static inline void finish_gated(const float* gate, const float* up, const PackedLinear& layer, long up_panel, Out* out,
                                int rows) {
  const long first = (up_panel - 1) * kPanel;
  out += first / 2;
  for (int r = 0; r < rows; r++, gate += kPanel, up += kPanel, out += layer.n / 2)
    for (long j = 0; j < kPanel; j += W)
      store(out + j, silu<sizeof(Out) == 2>(finished<T>(gate + j, layer, first + j)) *
                         finished<T>(up + j, layer, first + kPanel + j));
}

// Row of the weight [n][k] that is the first column of a panel.
static inline long source_row(long panel, long n, long gated) {
  return gated ? panel % 2 * (n / 2) + panel / 2 * kPanel : panel * kPanel;
}

// Outputs of a row.
static inline long out_width(const PackedLinear& layer) { return layer.gated ? layer.n / 2 : layer.n; }
