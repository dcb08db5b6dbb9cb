// Vectors of one instruction set, chosen by the compiler's flags: AVX-512 (16 floats), AVX2 (8), anything (4).
//
// Everything is written once on GCC/Clang vector extensions; intrinsics appear only where they save
// instructions. A "dword" is what a matrix kernel multiplies at a time: one float, or a pair of bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SS_AVX512BF16 1
#endif
#if defined(SS_AVX512BF16) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512VBMI__)
#define SS_AMX 1
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int kRows = 12;  // rows of a register block: kRows * 2 accumulators, with room for operands
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kRows = 4;
#else
constexpr int W = 4;
constexpr int kRows = 4;
#endif

typedef float VF __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));
typedef uint32_t VU __attribute__((vector_size(W * 4)));
typedef uint16_t VH __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

template <class V>
static inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
static inline void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

static inline VF splat(float x) { return x - VF{}; }
static inline VU splat_u(uint32_t x) { return x - VU{}; }
static inline VF as_f(VU v) { return (VF)v; }
static inline VU as_u(VF v) { return (VU)v; }
static inline VF select(VI mask, VF a, VF b) { return (VF)(((VI)a & mask) | ((VI)b & ~mask)); }

static inline VF vmax(VF a, VF b) {
#if defined(__AVX512F__)
  return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// Round to nearest even; NaN stays NaN.
static inline void from_float(float f, float* out) { *out = f; }
static inline void from_float(float f, bf16* out) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  out->bits = f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline VF load(const float* p) { return load_as<VF>(p); }
static inline VF load(const bf16* p) {
#if defined(__AVX512F__)
  return (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif defined(__AVX2__)
  return (VF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
#else
  return as_f(__builtin_convertvector(load_as<VH>(p), VU) << 16);
#endif
}

static inline VU round_bf16(VF v) {  // bfloat16 bits in the low half of each dword
  VU u = as_u(v);
  VU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  VI nan = v != v;
  return (rounded & (VU)~nan) | ((VU)nan & splat_u(0x7fc0));
}
static inline void store(float* p, VF v) { store_as(p, v); }
static inline void store(bf16* p, VF v) {
#if defined(SS_AVX512BF16)
  store_as(p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(__AVX2__)
  __m256i u = (__m256i)round_bf16(v);
  __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  store_as(p, h);
#else
  store_as(p, __builtin_convertvector(round_bf16(v), VH));
#endif
}

// 2 * W floats
static inline void store_two(float* p, VF low, VF high) { store(p, low), store(p + W, high); }
static inline void store_two(bf16* p, VF low, VF high) {
#if defined(SS_AVX512BF16)
  store_as(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  store(p, low), store(p + W, high);
#endif
}

static inline float sum_lanes(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 h = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

static inline float max_lanes(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < W; i++) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

static inline bool any(VI mask) {  // of a comparison
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  bool found = false;
  for (int i = 0; i < W; i++) found |= mask[i] != 0;
  return found;
#endif
}

// exp(x) for x <= 88, relative error below 2e-7; exactly 0 below -87.
static inline VF vexp(VF x) {
  VF low = splat(-87.0f);
  VF clamped = vmax(x, low);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  VF n = clamped * 1.44269504f + magic;
  VI exponent = (VI)n << 23;
  n = n - magic;
  VF f = clamped - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;
  VF p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  VF result = (VF)((VI)p + exponent);
  return select(x < low, splat(0.0f), result);
}

// 2^x for x <= 0, good enough for a value that is rounded to bfloat16 (relative error 1e-4); below -126: 2^-126 or less.
static inline VF vexp2_coarse(VF x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const __m512 f = _mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x); 0 of -inf
  VF q = (VF)f * 0.0790209f + 0.22433845f;
  q = q * (VF)f + 0.69664075f;
  q = q * (VF)f + 0.99989300f;
  return (VF)_mm512_scalef_ps((__m512)q, (__m512)x);  // * 2^floor(x)
#else
  const float magic = 12582912.0f;  // as in vexp
  const VF clamped = vmax(x, splat(-126.0f));
  const VF shifted = clamped + magic;
  const VF f = clamped - (shifted - magic);
  VF p = f * 0.05517166f + 0.24261112f;
  p = p * f + 0.69326099f;
  p = p * f + 0.99992807f;
  return (VF)((VI)p + ((VI)shifted << 23));
#endif
}

// x / (1 + e^-x); kCoarse: as exact as bfloat16 is. An exponential that overflows is infinite where it may, and
// not needed elsewhere.
template <bool kCoarse>
static inline VF silu(VF x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  if constexpr (kCoarse) return x * (VF)_mm512_rcp14_ps((__m512)(1.0f + vexp2_coarse(x * -1.44269504f)));
#endif
  const VF below = -vmax(x, -x);
  const VF e = kCoarse ? vexp2_coarse(below * 1.44269504f) : vexp(below);
  return x * select(x < splat(0.0f), e, splat(1.0f)) / (1.0f + e);
}

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// How a kernel multiplies dwords: `A` is one dword for all lanes, `B` a vector of dwords.
struct Float32 {
  using Element = float;
  static constexpr int per_dword = 1;
  using A = VF;
  using B = VF;
  static inline A load_a(const uint32_t* p) { return as_f(splat_u(load_as<uint32_t>(p))); }
  static inline B load_b(const uint32_t* p) { return load_as<VF>(p); }
  static inline VF madd(VF acc, A a, B b) { return acc + a * b; }
};

struct Bfloat16 {
  using Element = bf16;
  static constexpr int per_dword = 2;
#if defined(SS_AVX512BF16)
  using A = __m512bh;
  using B = __m512bh;
  static inline A load_a(const uint32_t* p) { return (__m512bh)_mm512_set1_epi32(load_as<int>(p)); }
  static inline B load_b(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline VF madd(VF acc, A a, B b) { return (VF)_mm512_dpbf16_ps((__m512)acc, b, a); }
#else
  struct Pair {
    VF even, odd;
  };
  using A = Pair;
  using B = Pair;
  static inline Pair split(VU v) { return {as_f(v << 16), as_f(v & 0xffff0000u)}; }
  static inline A load_a(const uint32_t* p) { return split(splat_u(load_as<uint32_t>(p))); }
  static inline B load_b(const uint32_t* p) { return split(load_as<VU>(p)); }
  static inline VF madd(VF acc, A a, B b) { return acc + a.even * b.even + a.odd * b.odd; }
#endif
};

// dst[i * dst_row + j] = src[j][i] for W x W dwords.
static inline void transpose_dwords(const uint32_t* const* src, uint32_t* dst, long dst_row) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(src[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i p = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), q = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i r = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i s = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    _mm512_storeu_si512(dst + i * dst_row, _mm512_shuffle_i32x4(p, r, 0x88));
    _mm512_storeu_si512(dst + (i + 4) * dst_row, _mm512_shuffle_i32x4(q, s, 0x88));
    _mm512_storeu_si512(dst + (i + 8) * dst_row, _mm512_shuffle_i32x4(p, r, 0xdd));
    _mm512_storeu_si512(dst + (i + 12) * dst_row, _mm512_shuffle_i32x4(q, s, 0xdd));
  }
#else
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) dst[i * dst_row + j] = src[j][i];
#endif
}

// c[R][NV * W] (+)= a[R][units] * b[units][NV * W], dwords by their own strides.
template <class E, int R, int NV, bool kStream = false>
static inline void multiply_block(const uint32_t* a, long a_row, long a_unit, const uint32_t* b, long b_unit,
                                  float* c, long c_row, long units, bool accumulate) {
  VF acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) acc[r][j] = accumulate ? load(c + r * c_row + j * W) : VF{};
  for (long u = 0; u < units; u++) {
    typename E::B bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) bv[j] = E::load_b(b + u * b_unit + j * W);
    if (kStream) {
#pragma GCC unroll 8
      for (int j = 0; j < NV * W; j += 16) prefetch(b + u * b_unit + 1024 + j);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      typename E::A av = E::load_a(a + r * a_row + u * a_unit);
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) acc[r][j] = E::madd(acc[r][j], av, bv[j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) store(c + r * c_row + j * W, acc[r][j]);
}

// The same for any number of rows up to kRows.
template <class E, int NV, bool kStream = false, int R = kRows>
static inline void multiply_rows(int rows, const uint32_t* a, long a_row, long a_unit, const uint32_t* b,
                                 long b_unit, float* c, long c_row, long units, bool accumulate) {
  if (rows == R)
    multiply_block<E, R, NV, kStream>(a, a_row, a_unit, b, b_unit, c, c_row, units, accumulate);
  else if constexpr (R > 1)
    multiply_rows<E, NV, kStream, R - 1>(rows, a, a_row, a_unit, b, b_unit, c, c_row, units, accumulate);
}
