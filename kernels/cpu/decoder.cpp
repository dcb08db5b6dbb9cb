// All layers of a decoder in one call, so that the caller's thread needs its interpreter once a step and not eight
// times a layer.
//
// The order of kernels is that of kernels/decoder.py, and so is every rounding.
#include "linear_layer.h"
#include "paged.h"
#include "pool.h"

struct DecoderLayer {  // mirrored by kernels/cpu/decoder.py
  const void *input_norm, *q_norm, *k_norm, *mlp_norm;  // q_norm and k_norm: null if there are none
  const PackedLinear *qkv, *output, *gate_up, *down;
};

struct Decoder {  // mirrored by kernels/cpu/decoder.py
  const DecoderLayer* layers;
  int64_t count;
  const void* last_norm;
  const float* cos_sin;
  int64_t heads;
  float eps, scale;
};

#define SS_DECLARE(suffix, T)                                                                                      \
  extern "C" {                                                                                                     \
  void ss_linear_##suffix(Pool*, const PackedLinear*, const T* x, long x_row, long rows, T* out);                  \
  void ss_linear_int8_##suffix(Pool*, const PackedLinear*, const T* x, long x_row, long rows, T* out);             \
  void ss_rms_norm_##suffix(Pool*, const T* x, long outer_stride, long inner, long inner_stride, const T* weight,  \
                            float eps, long rows, long width, T* out);                                             \
  void ss_add_rms_norm_##suffix(Pool*, const T* x, T* residual, const T* weight, float eps, long rows, long width, \
                                T* out);                                                                           \
  void ss_rope_kv_write_##suffix(Pool*, T* q, long q_row, long q_heads, T* k, long k_row, const T* v, long v_row,  \
                                 const float* cos_sin, const KvPool*, long layer, const Batch*);                   \
  void ss_decode_##suffix(Pool*, const Batch*, const KvPool*, long layer, const T* q, long q_row, long heads,      \
                          float scale, T* out);                                                                    \
  void ss_chunks_##suffix(Pool*, const Batch*, const KvPool*, long layer, const T* q, long q_row, long heads,      \
                          float scale, T* out);                                                                    \
  }                                                                                                                \
  template <>                                                                                                      \
  struct Native<T> {                                                                                               \
    static constexpr auto linear = ss_linear_##suffix, linear_int8 = ss_linear_int8_##suffix;                      \
    static constexpr auto rms_norm = ss_rms_norm_##suffix;                                                         \
    static constexpr auto add_rms_norm = ss_add_rms_norm_##suffix;                                                 \
    static constexpr auto rope_kv_write = ss_rope_kv_write_##suffix;                                               \
    static constexpr auto decode = ss_decode_##suffix, chunks = ss_chunks_##suffix;                                \
  };

template <class T>
struct Native;
SS_DECLARE(f32, float)
SS_DECLARE(bf16, bf16)

namespace {

template <class T>
void linear(Pool* pool, const PackedLinear* layer, const T* x, long rows, T* out) {
  (layer->scales ? Native<T>::linear_int8 : Native<T>::linear)(pool, layer, x, layer->k, rows, out);
}

template <class T>
void decoder(Pool* pool, const Decoder& model, const KvPool& kv, const Batch& batch, T* residual, T* room, T* out) {
  const long rows = batch.rows, head_dim = kv.head_dim, heads = model.heads, kv_heads = kv.kv_heads;
  const long query = heads * head_dim, key = kv_heads * head_dim, qkv_row = query + 2 * key;
  const long hidden = model.layers[0].qkv->k;
  const float eps = model.eps;
  T *qkv = room, *attended = qkv + rows * qkv_row, *normed = attended + rows * query, *inner = normed;
  const auto typed = [](const void* weight) { return static_cast<const T*>(weight); };
  Native<T>::rms_norm(pool, residual, hidden, 1, 0, typed(model.layers[0].input_norm), eps, rows, hidden, out);
  for (long i = 0; i < model.count; i++) {
    const DecoderLayer& layer = model.layers[i];
    linear(pool, layer.qkv, out, rows, qkv);
    T *q = qkv, *k = qkv + query;
    long q_row = qkv_row, k_row = qkv_row;
    if (layer.q_norm != nullptr) {
      q = normed, k = normed + rows * query, q_row = query, k_row = key;
      Native<T>::rms_norm(pool, qkv, qkv_row, heads, head_dim, typed(layer.q_norm), eps, rows * heads, head_dim, q);
      Native<T>::rms_norm(pool, qkv + query, qkv_row, kv_heads, head_dim, typed(layer.k_norm), eps, rows * kv_heads,
                          head_dim, k);
    }
    Native<T>::rope_kv_write(pool, q, q_row, heads, k, k_row, qkv + query + key, qkv_row, model.cos_sin, &kv, i,
                             &batch);
    if (batch.decodes > 0) Native<T>::decode(pool, &batch, &kv, i, q, q_row, heads, model.scale, attended);
    if (batch.decodes < batch.sequences)
      Native<T>::chunks(pool, &batch, &kv, i, q, q_row, heads, model.scale, attended);
    linear(pool, layer.output, attended, rows, out);
    Native<T>::add_rms_norm(pool, out, residual, typed(layer.mlp_norm), eps, rows, hidden, out);
    linear(pool, layer.gate_up, out, rows, inner);
    linear(pool, layer.down, inner, rows, out);
    const void* following = i + 1 < model.count ? model.layers[i + 1].input_norm : model.last_norm;
    Native<T>::add_rms_norm(pool, out, residual, typed(following), eps, rows, hidden, out);
  }
}

}  // namespace

extern "C" {

// residual [rows][hidden] is overwritten; out [rows][hidden] follows the last norm. `room`: rows times the widths of
// qkv, of the query heads, and of the larger of the MLP's inner layer and the query and key heads together.
void ss_decoder_f32(Pool* pool, const Decoder* model, const KvPool* kv, const Batch* batch, float* residual,
                    float* room, float* out) {
  decoder<float>(pool, *model, *kv, *batch, residual, room, out);
}
void ss_decoder_bf16(Pool* pool, const Decoder* model, const KvPool* kv, const Batch* batch, bf16* residual,
                     bf16* room, bf16* out) {
  decoder<bf16>(pool, *model, *kv, *batch, residual, room, out);
}
}
