// Linear layers from weights packed once: panels of 32 outputs, each [K / per_dword][32] dwords.
//
// One dword is a float or two bfloat16 neighbours in K, so one layout serves rows from 1 to thousands, and every
// instruction set. Without AMX the sum over K has one order, whatever the number of rows: a row's result
// depends on nothing but that row.
#include "linear.h"

namespace {

constexpr long kItemRows = 256;

template <class T>
void finish(const float* c, const PackedLinear& layer, long panel, T* out, long rows) {
  const T* bias = static_cast<const T*>(layer.bias);
  const long first = panel * kPanel, columns = layer.n - first < kPanel ? layer.n - first : kPanel;
  for (long r = 0; r < rows; r++, c += kPanel) {
    T* to = out + r * layer.n + first;
    long j = 0;
    for (; j + W <= columns; j += W) store(to + j, load(c + j) + (bias ? load(bias + first + j) : VF{}));
    for (; j < columns; j++) from_float(c[j] + (bias ? to_float(bias[first + j]) : 0.0f), to + j);
  }
}

template <class E>
void multiply_panel(int rows, const uint32_t* x, long x_row, const uint32_t* b, float* c, long units) {
  if (rows == 1) {
    multiply_block<E, 1, kPanel / W, true>(x, x_row, 1, b, kPanel, c, kPanel, units, false);
    return;
  }
  for (int j = 0; j < kPanel; j += 2 * W)
    multiply_rows<E, 2, true>(rows, x, x_row, 1, b + j, kPanel, c + j, kPanel, units, false);
}

// Output columns of one panel for a block of at most kRows rows.
template <class E>
void dot_block(const PackedLinear& layer, long panel, const typename E::Element* x, long x_row, int rows,
               typename E::Element* out) {
  const long units = layer.k / E::per_dword;
  const uint32_t* b = static_cast<const uint32_t*>(layer.weight) + panel * units * kPanel;
  alignas(64) float c[kRows * kPanel];
  multiply_panel<E>(rows, reinterpret_cast<const uint32_t*>(x), x_row / E::per_dword, b, c, units);
  finish(c, layer, panel, out, rows);
}

#if defined(SS_AMX)
// The same for at most 32 rows, in tiles.
void tile_block(const Tiles& tiles, const PackedLinear& layer, long panel, const bf16* x, long x_row, int rows,
                bf16* out) {
  const long units = layer.k / 2;
  const uint32_t* b = static_cast<const uint32_t*>(layer.weight) + panel * units * kPanel;
  alignas(64) float c[32 * kPanel];
  tiles.multiply<true>(reinterpret_cast<const uint32_t*>(x), x_row / 2, b, kPanel, c, kPanel, units, false);
  finish(c, layer, panel, out, rows);
}
#endif

// A work item is a group of panels times a range of rows. Within it, a block of rows stays in the first-level
// cache while the group's panels pass by it from the second level.
template <class E>
void linear(Pool* pool, const PackedLinear& layer, const typename E::Element* x, long x_row, long rows,
            typename E::Element* out) {
  const long panels = (layer.n + kPanel - 1) / kPanel, supers = (rows + kItemRows - 1) / kItemRows;
  const long group = panels_per_item(panels, layer.k / E::per_dword * kPanel * 4, rows, pool_threads(pool));
  const long groups = (panels + group - 1) / group;
  parallel_for(pool, groups * supers, [&](long item) {
    const long start = item % supers * kItemRows, first = item / supers * group;
    const long stop = start + kItemRows < rows ? start + kItemRows : rows;
    const long last = first + group < panels ? first + group : panels;
#if defined(SS_AMX)
    if constexpr (E::per_dword == 2) {
      if (layer.k % 32 == 0) {
        Tiles tiles;
        for (long r = start; r < stop; r += 32) {
          const int count = (int)(stop - r < 32 ? stop - r : 32);
          tiles.set_rows(count);
          for (long p = first; p < last; p++)
            tile_block(tiles, layer, p, x + r * x_row, x_row, count, out + r * layer.n);
        }
        return;
      }
    }
#endif
    const long blocks = (stop - start + kRows - 1) / kRows, most = (stop - start + blocks - 1) / blocks;
    for (long r = start; r < stop; r += most) {
      const int count = (int)(stop - r < most ? stop - r : most);
      for (long p = first; p < last; p++)
        dot_block<E>(layer, p, x + r * x_row, x_row, count, out + r * layer.n);
    }
  });
}

// weight [n][k] -> panels; columns past n are zero.
template <class E>
void pack(const uint32_t* weight, long n, long units, uint32_t* packed) {
  for (long p = 0; p * kPanel < n; p++)
    for (long u = 0; u < units; u++)
      for (long j = 0; j < kPanel; j++, packed++) *packed = p * kPanel + j < n ? weight[(p * kPanel + j) * units + u] : 0;
}

}  // namespace

extern "C" {

void ss_pack_f32(const uint32_t* weight, long n, long k, uint32_t* packed) { pack<Float32>(weight, n, k, packed); }
void ss_pack_bf16(const uint32_t* weight, long n, long k, uint32_t* packed) {
  pack<Bfloat16>(weight, n, k / 2, packed);
}

// x [rows][k], x_row elements from row to row; out [rows][n] contiguous. bfloat16: k and x_row even.
void ss_linear_f32(Pool* pool, const PackedLinear* layer, const float* x, long x_row, long rows, float* out) {
  linear<Float32>(pool, *layer, x, x_row, rows, out);
}
void ss_linear_bf16(Pool* pool, const PackedLinear* layer, const bf16* x, long x_row, long rows, bf16* out) {
  linear<Bfloat16>(pool, *layer, x, x_row, rows, out);
}
}
