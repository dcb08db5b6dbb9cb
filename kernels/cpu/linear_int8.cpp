// Linear layers with int8 weights, one scale per output: y = scale * (x @ w) + bias.
//
// Panels are [K / 4][32] dwords of four neighbours in K, each stored as w + 128. Few rows: integer dot products
// (VNNI) with activations split into two int8 digits, 15 bits in all, so that rounding them costs less than
// bfloat16 does. Many rows, or no VNNI: panels are turned into the activations' type, in which int8 is exact.
#include <cmath>

#include "linear.h"

namespace {

// One panel to [K / per_dword][32] dwords of E.
template <class E>
void widen(const uint32_t* panel, long quads, uint32_t* to) {
  for (long u = 0; u < quads; u++, panel += kPanel, to += kPanel * (4 / E::per_dword))
    for (int j = 0; j < kPanel; j += W) {
      const VU v = load_as<VU>(panel + j);
      VF k[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) k[i] = __builtin_convertvector((VI)((v >> (8 * i)) & 0xff) - 128, VF);
      if constexpr (E::per_dword == 2) {
        store_as(to + j, (as_u(k[0]) >> 16) | (as_u(k[1]) & 0xffff0000u));
        store_as(to + kPanel + j, (as_u(k[2]) >> 16) | (as_u(k[3]) & 0xffff0000u));
      } else {
        for (int i = 0; i < 4; i++) store(reinterpret_cast<float*>(to) + i * kPanel + j, k[i]);
      }
    }
}

template <class E, class Out, class T = typename E::Element>
void linear_widened(Pool* pool, const PackedLinear& layer, const T* x, long x_row, long rows, Out* out) {
  const long quads = layer.k / 4, size = layer.k / E::per_dword * kPanel;
  over_panels(pool, layer, size * 4, rows, [&](long first, long last, long row, long count) {
    // With few rows a panel is used once, while it is in the first-level cache.
    const long step = rows <= 32 ? 1 + layer.gated : last - first;
    uint32_t* wide = static_cast<uint32_t*>(scratch(5, (size_t)(step * size) * 4 + 16384));
    for (long p = first; p < last; p += step) {
      for (long i = 0; i < step; i++)
        widen<E>(static_cast<const uint32_t*>(layer.weight) + (p + i) * quads * kPanel, quads, wide + i * size);
      multiply_panels<E>(layer, wide, p, p + step, x + row * x_row, x_row, count, out + row * out_width(layer));
    }
  });
}

#if defined(__AVX512VNNI__)

constexpr long kDigitRows = 32;  // up to so many rows digits beat widened panels
constexpr long kMostK = 60000;  // 255 * 127 * k fits an int32

struct Int8 {
  static constexpr int per_dword = 4;
  using A = __m512i;
  using B = __m512i;
  static inline A load_a(const uint32_t* p) { return _mm512_set1_epi32(load_as<int>(p)); }
  static inline B load_b(const uint32_t* p) { return _mm512_loadu_si512(p); }
  // The lanes of the accumulator are int32, carried as floats.
  static inline VF madd(VF acc, A a, B b) { return (VF)_mm512_dpbusd_epi32((__m512i)acc, b, a); }
};

struct Digits {  // x = unit * (128 * high + low); rows 2r and 2r + 1 of `values` are the high and low digits of r
  int8_t* values;
  float unit[kDigitRows];
  int32_t offset[2 * kDigitRows];  // 128 * the sum of a row's digits
};

template <class T>
void split(const T* x, long x_row, long rows, long k, Digits& digits) {
  for (long r = 0; r < rows; r++, x += x_row) {
    float most = 0;
    for (long i = 0; i < k; i++) {
      const float magnitude = std::fabs(to_float(x[i]));
      most = magnitude > most ? magnitude : most;
    }
    const float inverse = most > 0 ? 16256.0f / most : 0.0f;  // 127 * 128
    int8_t *high = digits.values + 2 * r * k, *low = high + k;
    int32_t sums[2] = {};
    for (long i = 0; i < k; i++) {
      const float scaled = to_float(x[i]) * inverse;
      const int q = (int)(scaled + (scaled < 0 ? -0.5f : 0.5f));
      const int h = (q + 64) >> 7, l = q - h * 128;
      high[i] = (int8_t)h, low[i] = (int8_t)l;
      sums[0] += h, sums[1] += l;
    }
    digits.unit[r] = most / 16256.0f;
    digits.offset[2 * r] = 128 * sums[0], digits.offset[2 * r + 1] = 128 * sums[1];
  }
}

// A row's sums over a panel from those of its digits, [2][kPanel], digit row `first` and the next.
static inline void join(const Digits& digits, long first, const float* c, float* y) {
  for (int j = 0; j < kPanel; j += W) {
    const VI high = (VI)load(c + j) - digits.offset[first];
    const VI low = (VI)load(c + kPanel + j) - digits.offset[first + 1];
    const VF sum = __builtin_convertvector(high, VF) * 128.0f + __builtin_convertvector(low, VF);
    store(y + j, sum * digits.unit[first / 2]);
  }
}

// Results of a panel, or a pair of panels up to `panel`, from the sums of digit rows [first, first + count).
template <class T, class Out>
void join_rows(const PackedLinear& layer, long panel, const Digits& digits, long first, int count,
               const float* const* sums, Out* out) {
  alignas(64) float y[2][kPanel];
  out += first / 2 * out_width(layer);
  for (int i = 0; i < count; i += 2, out += out_width(layer)) {
    for (int h = 0; h <= layer.gated; h++) join(digits, first + i, sums[h] + i * kPanel, y[h]);
    if (layer.gated)
      finish_gated<T>(y[0], y[1], layer, panel, out, 1);
    else
      finish<T>(y[0], layer, panel, out, 1);
  }
}

template <class T, class Out>
void linear_digits(Pool* pool, const PackedLinear& layer, const T* x, long x_row, long rows, Out* out) {
  const long quads = layer.k / 4, width = 1 + layer.gated;  // panels that are finished together
  Digits digits;
  digits.values = static_cast<int8_t*>(scratch(6, (size_t)(2 * rows * layer.k)));
  split(x, x_row, rows, layer.k, digits);
  const uint32_t* a = reinterpret_cast<const uint32_t*>(digits.values);
  over_panels(pool, layer, quads * kPanel * 4, rows, [&](long first, long last, long, long) {
    alignas(64) float c[2][32 * kPanel];
    const float* sums[2] = {c[0], c[1]};
    const auto panel = [&](long p) { return static_cast<const uint32_t*>(layer.weight) + p * quads * kPanel; };
#if defined(SS_AMX)
    if (layer.k % 64 == 0) {
      Tiles tiles;
      for (long r = 0; r < 2 * rows; r += 32) {
        const int count = (int)(2 * rows - r < 32 ? 2 * rows - r : 32);
        const uint32_t* rows_a = a + r * quads;
        tiles.set_rows(count);
        for (long p = first; p < last; p += width) {
          for (int h = 0; h < width; h++)
            tiles.multiply<true, true>(rows_a, rows_a + 16 * quads, quads, panel(p + h), kPanel, c[h], kPanel, quads,
                                       false);
          join_rows<T>(layer, p + width - 1, digits, r, count, sums, out);
        }
      }
      return;
    }
#endif
    for (long p = first; p < last; p += width)
      for (long r = 0; r < 2 * rows; r += kRows) {
        const int count = (int)(2 * rows - r < kRows ? 2 * rows - r : kRows);
        for (int h = 0; h < width; h++)
          multiply_rows<Int8, 2, true>(count, a + r * quads, quads, 1, panel(p + h), kPanel, c[h], kPanel, quads,
                                       false);
        join_rows<T>(layer, p + width - 1, digits, r, count, sums, out);
      }
  });
}

#endif

template <class E, class Out, class T = typename E::Element>
void linear_int8(Pool* pool, const PackedLinear& layer, const T* x, long x_row, long rows, Out* out) {
#if defined(__AVX512VNNI__)
  if (rows <= kDigitRows && layer.k <= kMostK) return linear_digits(pool, layer, x, x_row, rows, out);
#endif
  linear_widened<E>(pool, layer, x, x_row, rows, out);
}

}  // namespace

extern "C" {

// weight [n][k] float32, k % 4 == 0 -> panels (n rounded up to 32, times k bytes) and scales [n], in the order of
// the panels' columns. gated: see PackedLinear; n is a multiple of 64.
void ss_pack_int8(const float* weight, long n, long k, long gated, uint8_t* packed, float* scales) {
  for (long panel = 0; panel * kPanel < n; panel++, packed += kPanel * k) {
    const float* rows = weight + source_row(panel, n, gated) * k;
    for (long j = 0; j < kPanel; j++) {
      uint8_t* to = packed + j * 4;
      if (panel * kPanel + j >= n) {
        for (long u = 0; u < k; u += 4) std::memset(to + u * kPanel, 128, 4);
        continue;
      }
      const float* row = rows + j * k;
      float most = 0;
      for (long i = 0; i < k; i++) {
        const float magnitude = std::fabs(row[i]);
        most = magnitude > most ? magnitude : most;
      }
      const float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
      scales[panel * kPanel + j] = scale;
      for (long u = 0; u < k; u += 4)
        for (long i = 0; i < 4; i++) {
          const float q = row[u + i] * inverse;
          to[u * kPanel + i] = (uint8_t)(128 + (int)(q + (q < 0 ? -0.5f : 0.5f)));
        }
    }
  }
}

// As ss_linear of the same suffix.
void ss_linear_int8_f32(Pool* pool, const PackedLinear* layer, const float* x, long x_row, long rows, float* out) {
  linear_int8<Float32>(pool, *layer, x, x_row, rows, out);
}
void ss_linear_int8_bf16(Pool* pool, const PackedLinear* layer, const bf16* x, long x_row, long rows, bf16* out) {
  linear_int8<Bfloat16>(pool, *layer, x, x_row, rows, out);
}
void ss_linear_int8_wide_f32(Pool* pool, const PackedLinear* layer, const float* x, long x_row, long rows,
                             float* out) {
  linear_int8<Float32>(pool, *layer, x, x_row, rows, out);
}
void ss_linear_int8_wide_bf16(Pool* pool, const PackedLinear* layer, const bf16* x, long x_row, long rows,
                              float* out) {
  linear_int8<Bfloat16>(pool, *layer, x, x_row, rows, out);
}
}
