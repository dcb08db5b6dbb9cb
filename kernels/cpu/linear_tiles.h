// Many rows by the panels of a linear layer, in tiles of AMX.
//
// Rows of x stay in the first-level cache, panels stream past it from the second: loading them with the hint that
// they are not needed again keeps the rows there. The results of one block are finished (scaled, activated,
// rounded) row by row between the products of the next one, which run beside that.
#pragma once

#include "linear_layer.h"

#if defined(SS_AMX)

constexpr long kTileRows = 32;
constexpr long kNearUnits = 320;  // dwords of K up to which 32 rows stay in the first-level cache
constexpr long kChunkUnits = 256;  // dwords of K at a time where they would not
constexpr long kGroupPanels = 8;   // panels whose sums wait for the next chunk of K

// Sums of a block that wait to be finished.
template <class T, class Out>
class Pending {
 public:
  explicit Pending(const PackedLinear& layer) : layer_(layer) {}
  ~Pending() { rows(kTileRows); }
  Pending(const Pending&) = delete;
  Pending& operator=(const Pending&) = delete;

  // Takes over the sums of `panel`, and of the gates before it if the layer is gated.
  void begin(const float* gate, const float* sums, long panel, Out* out, int count) {
    rows(kTileRows);
    gate_ = gate, sums_ = sums, panel_ = panel, out_ = out, left_ = count;
  }

  void rows(long most) {
    for (; most > 0 && left_ > 0; most--, left_--) {
      if (layer_.gated)
        finish_gated<T>(gate_, sums_, layer_, panel_, out_, 1);
      else
        finish<T>(sums_, layer_, panel_, out_, 1);
      gate_ += kPanel, sums_ += kPanel, out_ += out_width(layer_);
    }
  }

 private:
  const PackedLinear& layer_;
  const float *gate_ = nullptr, *sums_ = nullptr;
  Out* out_ = nullptr;
  long panel_ = 0;
  int left_ = 0;
};

// 32 rows: the dword u of row r lies at data[u / 16 * step + r * row + u % 16]; row is 16 or more.
struct TileBlock {
  const uint32_t* data;
  long row, step;
};

// c[32][32] (+)= a * b[units][32]; `pending` goes on in between.
// kFetch: lines of b that lie `ahead` dwords further are on their way to the second-level cache afterwards.
template <bool kFetch, class P>
static inline void multiply_tile_block(const TileBlock& a, long first, const uint32_t* b, float* c, long units,
                                       bool accumulate, P& pending, int rows_a_step, long ahead) {
  const long c_bytes = kPanel * 4, a_bytes = a.row * 4;
  const uint32_t *upper = a.data + first / 16 * a.step, *lower = upper + 16 * a.row;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c + 16 * kPanel, c_bytes);
    _tile_loadd(3, c + 16 * kPanel + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long u = 0; u < units; u += 16, b += 16 * kPanel, upper += a.step, lower += a.step) {
    if constexpr (kFetch)
#pragma GCC unroll 32
      for (int i = 0; i < 32; i++) _mm_prefetch(reinterpret_cast<const char*>(b + ahead + i * 16), _MM_HINT_T1);
    _tile_stream_loadd(6, b, kPanel * 4);
    _tile_loadd(4, upper, a_bytes);
    _tile_stream_loadd(7, b + 16, kPanel * 4);
    _tile_loadd(5, lower, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    pending.rows(rows_a_step);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c + 16 * kPanel, c_bytes);
  _tile_stored(3, c + 16 * kPanel + 16, c_bytes);
}

// Up to 32 rows side by side, in tiles; those that are not there are zero.
static inline void pack_tile_rows(const uint32_t* x, long x_row, int count, long units, uint32_t* to) {
  for (long u = 0; u < units; u += 16)
    for (int r = 0; r < kTileRows; r++, to += 16)
      _mm512_store_si512(to, r < count ? _mm512_loadu_si512(x + r * x_row + u) : __m512i{});
}

// As multiply_panels; k % 32 == 0.
template <class Out>
static void multiply_tiles(const PackedLinear& layer, const uint32_t* panels, long first, long last, const bf16* x,
                           long x_row, long rows, Out* out) {
  constexpr long kSlots = kGroupPanels + 2;  // those of a group, and a pair that is still being finished
  alignas(64) float sums[kSlots][kTileRows * kPanel];
  const long units = layer.k / 2, size = units * kPanel;
  const long chunk = units <= kNearUnits ? units : kChunkUnits;
  const int rows_a_step = layer.gated ? 1 : 2;
  Tiles tiles;
  tiles.set_rows(kTileRows);
  Pending<bf16, Out> pending(layer);
  long slot = 0;  // of the group's first panel: sums that are still being finished are not written to
  for (long r = 0; r < rows; r += kTileRows, x += kTileRows * x_row, out += kTileRows * out_width(layer)) {
    const int count = (int)(rows - r < kTileRows ? rows - r : kTileRows);
    TileBlock block = {reinterpret_cast<const uint32_t*>(x), x_row / 2, 16};
    const bool crowded = x_row * (long)sizeof(bf16) % 2048 == 0;  // rows would push each other out of the cache
    if (count < kTileRows || (chunk < units && crowded)) {
      uint32_t* packed = static_cast<uint32_t*>(scratch(7, (size_t)(kTileRows * units) * sizeof(uint32_t)));
      pack_tile_rows(block.data, block.row, count, units, packed);
      block = {packed, 16, 16 * kTileRows};
    }
    for (long group = first, end; group < last; slot += end - group, group = end) {
      end = group + kGroupPanels < last ? group + kGroupPanels : last;
      for (long u = 0; u < units; u += chunk) {
        const long step = units - u < chunk ? units - u : chunk;
        for (long p = group; p < end; p++) {
          const long place = slot + p - group;
          float* c = sums[place % kSlots];
          const uint32_t* b = panels + (p - first) * size + u * kPanel;
          if (r == 0)
            multiply_tile_block<true>(block, u, b, c, step, u > 0, pending, rows_a_step, size);
          else
            multiply_tile_block<false>(block, u, b, c, step, u > 0, pending, rows_a_step, 0);
          if (u + step == units && (!layer.gated || p % 2 == 1))
            pending.begin(sums[(place + kSlots - 1) % kSlots], c, p, out, count);
        }
      }
    }
  }
}

#endif
