// Linear layers with float32 and bfloat16 weights.
#include "linear.h"

namespace {

template <class E, class Out, class T = typename E::Element>
void linear(Pool* pool, const PackedLinear& layer, const T* x, long x_row, long rows, Out* out) {
  const long size = layer.k / E::per_dword * kPanel;
  over_panels(pool, layer, size * 4, rows, [&](long first, long last, long row, long count) {
    const uint32_t* panels = static_cast<const uint32_t*>(layer.weight) + first * size;
    multiply_panels<E>(layer, panels, first, last, x + row * x_row, x_row, count, out + row * out_width(layer));
  });
}

// weight [n][units] dwords -> panels; columns past n are zero. gated: see PackedLinear; n is a multiple of 64.
void pack(const uint32_t* weight, long n, long units, long gated, uint32_t* packed) {
  for (long panel = 0; panel * kPanel < n; panel++, packed += units * kPanel) {
    const uint32_t* rows = weight + source_row(panel, n, gated) * units;
    const long present = n - panel * kPanel;
    for (long j = 0; j < kPanel; j += W) {
      long u = 0;
      if (j + W <= present)
        for (; u + W <= units; u += W) {
          const uint32_t* from[W];
          for (int i = 0; i < W; i++) from[i] = rows + (j + i) * units + u;
          transpose_dwords(from, packed + u * kPanel + j, kPanel);
        }
      for (; u < units; u++)
        for (int i = 0; i < W; i++) packed[u * kPanel + j + i] = j + i < present ? rows[(j + i) * units + u] : 0;
    }
  }
}

}  // namespace

extern "C" {

// weight [n][k]; packed: n rounded up to 32, times k. bfloat16: k even.
void ss_pack_f32(const void* weight, long n, long k, long gated, void* packed) {
  pack(static_cast<const uint32_t*>(weight), n, k, gated, static_cast<uint32_t*>(packed));
}
void ss_pack_bf16(const void* weight, long n, long k, long gated, void* packed) {
  pack(static_cast<const uint32_t*>(weight), n, k / 2, gated, static_cast<uint32_t*>(packed));
}

// x [rows][k], x_row elements from row to row; out [rows][n, or n / 2 if gated] contiguous. bfloat16: k and x_row
// even. `wide`: out is float32.
void ss_linear_f32(Pool* pool, const PackedLinear* layer, const float* x, long x_row, long rows, float* out) {
  linear<Float32>(pool, *layer, x, x_row, rows, out);
}
void ss_linear_bf16(Pool* pool, const PackedLinear* layer, const bf16* x, long x_row, long rows, bf16* out) {
  linear<Bfloat16>(pool, *layer, x, x_row, rows, out);
}
void ss_linear_wide_f32(Pool* pool, const PackedLinear* layer, const float* x, long x_row, long rows, float* out) {
  linear<Float32>(pool, *layer, x, x_row, rows, out);
}
void ss_linear_wide_bf16(Pool* pool, const PackedLinear* layer, const bf16* x, long x_row, long rows, float* out) {
  linear<Bfloat16>(pool, *layer, x, x_row, rows, out);
}
}
