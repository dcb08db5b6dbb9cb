// Tiles of AMX: 16 rows of 64 bytes, multiplied as bfloat16 pairs, or as bytes (signed `a`, unsigned `b`) into
// int32. Absent unless compiled for AMX.
//
// Tiles 0-3 accumulate a block of 32 x 32, 4-5 hold its rows of `a`, 6-7 its columns of `b`.
#pragma once

#include "simd.h"

#if defined(SS_AMX)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // The upper tiles have `first` rows, the lower ones `second` (0: not used).
  TileConfig(int first, int second) {
    const int counts[8] = {first, first, second, second, first, second, 16, 16};
    for (int t = 0; t < 8; t++)
      if (counts[t]) rows[t] = (uint8_t)counts[t], row_bytes[t] = 64;
  }
};

// The tile registers of this thread, set up for blocks of at most 32 rows, and released at the end.
class Tiles {
 public:
  Tiles() = default;
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  void set_rows(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileConfig config(rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 0);
    asm volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic declares the first 8 bytes alone as read
    _tile_loadconfig(&config);
  }

  // c[rows][32] (+)= a[rows][units] * b[units][32]: strides in dwords, rows as in set_rows, units % 16 == 0.
  // Rows 16 and above of `a` begin at `lower`.
  template <bool kStream, bool kBytes = false>
  void multiply(const uint32_t* a, const uint32_t* lower, long a_row, const uint32_t* b, long b_unit, float* c,
                long c_row, long units, bool accumulate) const {
    if (rows_ > 16)
      multiply_32<kStream, kBytes>(a, lower, a_row * 4, b, b_unit, c, c_row, units, accumulate);
    else
      multiply_16<kStream, kBytes>(a, a_row * 4, b, b_unit, c, c_row, units, accumulate);
  }

 private:
  template <bool kStream>
  static inline void ahead(const uint32_t* b, long b_unit) {
    if (kStream) {
#pragma GCC unroll 16
      for (int u = 0; u < 16; u++) {
        prefetch(b + u * b_unit + 2048);
        prefetch(b + u * b_unit + 2048 + 16);
      }
    }
  }

  template <bool kStream, bool kBytes>
  static void multiply_32(const uint32_t* a, const uint32_t* lower, long a_bytes, const uint32_t* b, long b_unit,
                          float* c, long c_row, long units, bool accumulate) {
    const long c_bytes = c_row * 4, b_bytes = b_unit * 4;
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
      _tile_loadd(2, c + 16 * c_row, c_bytes);
      _tile_loadd(3, c + 16 * c_row + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (long u = 0; u < units; u += 16) {
      const uint32_t* bu = b + u * b_unit;
      ahead<kStream>(bu, b_unit);
      _tile_loadd(6, bu, b_bytes);
      _tile_loadd(4, a + u, a_bytes);
      _tile_loadd(7, bu + 16, b_bytes);
      _tile_loadd(5, lower + u, a_bytes);
      if constexpr (kBytes) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * c_row, c_bytes);
    _tile_stored(3, c + 16 * c_row + 16, c_bytes);
  }

  template <bool kStream, bool kBytes>
  static void multiply_16(const uint32_t* a, long a_bytes, const uint32_t* b, long b_unit, float* c, long c_row,
                          long units, bool accumulate) {
    const long c_bytes = c_row * 4, b_bytes = b_unit * 4;
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (long u = 0; u < units; u += 16) {
      const uint32_t* bu = b + u * b_unit;
      ahead<kStream>(bu, b_unit);
      _tile_loadd(4, a + u, a_bytes);
      _tile_loadd(6, bu, b_bytes);
      _tile_loadd(7, bu + 16, b_bytes);
      if constexpr (kBytes) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
  }

  int rows_ = 0;
};

#endif
