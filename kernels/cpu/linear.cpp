// Linear layers with float32 and bfloat16 weights.
#include "linear.h"

namespace {

template <class E, class T = typename E::Element>
void linear(Pool* pool, const PackedLinear& layer, const T* x, long x_row, long rows, T* out) {
  const long size = layer.k / E::per_dword * kPanel;
  over_panels(pool, layer, size * 4, rows, [&](long first, long last, long row, long count) {
    const uint32_t* panels = static_cast<const uint32_t*>(layer.weight) + first * size;
    multiply_panels<E>(layer, panels, first, last, x + row * x_row, x_row, count, out + row * layer.n);
  });
}

// weight [n][units] dwords -> panels; columns past n are zero.
void pack(const uint32_t* weight, long n, long units, uint32_t* packed) {
  for (long first = 0; first < n; first += kPanel)
    for (long u = 0; u < units; u++)
      for (long j = first; j < first + kPanel; j++) *packed++ = j < n ? weight[j * units + u] : 0;
}

}  // namespace

extern "C" {

// weight [n][k]; packed: n rounded up to 32, times k. bfloat16: k even.
void ss_pack_f32(const void* weight, long n, long k, void* packed) {
  pack(static_cast<const uint32_t*>(weight), n, k, static_cast<uint32_t*>(packed));
}
void ss_pack_bf16(const void* weight, long n, long k, void* packed) {
  pack(static_cast<const uint32_t*>(weight), n, k / 2, static_cast<uint32_t*>(packed));
}

// x [rows][k], x_row elements from row to row; out [rows][n] contiguous. bfloat16: k and x_row even.
void ss_linear_f32(Pool* pool, const PackedLinear* layer, const float* x, long x_row, long rows, float* out) {
  linear<Float32>(pool, *layer, x, x_row, rows, out);
}
void ss_linear_bf16(Pool* pool, const PackedLinear* layer, const bf16* x, long x_row, long rows, bf16* out) {
  linear<Bfloat16>(pool, *layer, x, x_row, rows, out);
}
}
