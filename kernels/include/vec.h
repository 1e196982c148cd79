// Vec<float, Isa>: the lanes of one register, loaded from and stored to every element type.
// Arithmetic is written with the compiler's vector types; only what they lack is spelled in intrinsics.
// Nothing is contracted behind our back (-ffp-contract=off): a sum has the same bits in every loop that forms it.
#pragma once

#include "dtypes.h"
#include "isa.h"

namespace kvrun {
namespace {

template <class T, class I>
struct Vec;

#if defined(__AVX512F__)
inline Avx512::Floats raw_fma(Avx512::Floats a, Avx512::Floats b, Avx512::Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Avx512::Floats raw_load(const Bfloat16* p, Avx512) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void raw_store(Bfloat16* p, Avx512::Words v, Avx512) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
}
inline Avx512::Floats raw_load(const Float16* p, Avx512) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void raw_store(Float16* p, Avx512::Floats v, Avx512) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0)); }
inline __m256 raw_fold(Avx512::Floats v) {
  const __m512 w = v;
  return _mm512_castps512_ps256(w) + _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(w), 1));
}
#endif
#if defined(__AVX2__)
inline Avx2::Floats raw_fma(Avx2::Floats a, Avx2::Floats b, Avx2::Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Avx2::Floats raw_load(const Bfloat16* p, Avx2) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline void raw_store(Bfloat16* p, Avx2::Words v, Avx2) {
  const __m256i words = (__m256i)v;
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline Avx2::Floats raw_load(const Float16* p, Avx2) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void raw_store(Float16* p, Avx2::Floats v, Avx2) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, 0)); }
inline __m256 raw_fold(Avx2::Floats v) { return v; }
inline void raw_sum4(__m256 a, __m256 b, __m256 c, __m256 d, float* out) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm256_castps256_ps128(pairs) + _mm256_extractf128_ps(pairs, 1));
}
#else
inline Generic::Floats raw_fma(Generic::Floats a, Generic::Floats b, Generic::Floats c) { return a * b + c; }
inline Generic::Floats raw_load(const Bfloat16* p, Generic) {
  Generic::Halves h;
  memcpy(&h, p, sizeof h);
  return (Generic::Floats)(__builtin_convertvector(h, Generic::Words) << 16);
}
inline void raw_store(Bfloat16* p, Generic::Words v, Generic) {
  const Generic::Halves h = __builtin_convertvector(v, Generic::Halves);
  memcpy(p, &h, sizeof h);
}
inline Generic::Floats raw_load(const Float16* p, Generic) {
  return Generic::Floats{half_to_float(p[0].bits), half_to_float(p[1].bits), half_to_float(p[2].bits), half_to_float(p[3].bits)};
}
inline void raw_store(Float16* p, Generic::Floats v, Generic) {
  for (int i = 0; i < Generic::lanes; i++) p[i].bits = float_to_half(v[i]);
}
#endif

template <class I>
struct Vec<float, I> {
  using Raw = typename I::Floats;
  using Ints = typename I::Ints;
  using Words = typename I::Words;
  static constexpr int width = I::lanes;

  Raw raw;

  Vec() = default;
  Vec(Raw r) : raw(r) {}
  explicit Vec(float value) : raw(value - Raw{}) {}
  static Vec zero() { return Raw{}; }

  static Vec load(const float* p) {
    Raw r;
    memcpy(&r, p, sizeof r);
    return r;
  }
  static Vec load(const Bfloat16* p) { return raw_load(p, I{}); }
  static Vec load(const Float16* p) { return raw_load(p, I{}); }

  // Reads n < width elements; the other lanes are 0. The ends of rows are rare: not inlined, to build quickly.
  template <class T>
  __attribute__((noinline)) static Vec load(const T* p, int64_t n) {
    T all[width] = {};
    for (int64_t i = 0; i < n; i++) all[i] = p[i];
    return load(all);
  }

  void store(float* p) const { memcpy(p, &raw, sizeof raw); }
  void store(Bfloat16* p) const {
#if defined(__AVX512BF16__)
    // The same, but for numbers below the least normal one, which become 0.
    if constexpr (width == 16) {
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)raw);
      memcpy(p, &rounded, sizeof rounded);
      return;
    }
#endif
    const Words bits = (Words)raw, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    // Rounding would turn some NaNs into infinities.
    raw_store(p, raw == raw ? rounded : (bits >> 16) | 0x40, I{});
  }
  void store(Float16* p) const { raw_store(p, raw, I{}); }
  template <class T>
  __attribute__((noinline)) void store(T* p, int64_t n) const {
    T all[width];
    store(all);
    for (int64_t i = 0; i < n; i++) p[i] = all[i];
  }

  friend Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  friend Vec max(Vec a, Vec b) { return a.raw > b.raw ? a.raw : b.raw; }
  friend Vec abs(Vec a) { return (Raw)((Words)a.raw & 0x7fffffffu); }
  friend Vec copysign(Vec magnitude, Vec sign) {
    return (Raw)((Words)magnitude.raw | ((Words)sign.raw & 0x80000000u));
  }
  // a * b + c
  friend Vec fma(Vec a, Vec b, Vec c) { return raw_fma(a.raw, b.raw, c.raw); }

  float first() const { return raw[0]; }
};

using Floats = Vec<float, Isa>;

// The sums of the lanes of four vectors.
inline void sum4(Floats a, Floats b, Floats c, Floats d, float* out) {
#if defined(__AVX2__)
  raw_sum4(raw_fold(a.raw), raw_fold(b.raw), raw_fold(c.raw), raw_fold(d.raw), out);
#else
  const Floats all[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++) out[i] = (all[i].raw[0] + all[i].raw[1]) + (all[i].raw[2] + all[i].raw[3]);
#endif
}

inline float sum(Floats a) {
  float out[4];
  sum4(a, a, a, a, out);
  return out[0];
}

inline float largest(Floats a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(a.raw);
#else
  float all[Floats::width];
  a.store(all);
  for (int half = Floats::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) all[i] = all[i] > all[i + half] ? all[i] : all[i + half];
  return all[0];
#endif
}

// Into the second level of cache: the first has fewer misses under way at once than memory needs to stream.
inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// e^x to 2 units in the last place; exactly 0 below -87.3, finite up to 88.
inline Floats exp(Floats x) {
  const auto low = x.raw < -87.3f;
  Floats c = x.raw > 88.0f ? Floats(88.0f).raw : x.raw;
  c = low ? Floats(-87.3f).raw : c.raw;
  // Adding 1.5 * 2^23 rounds to an integer.
  const Floats magic(12582912.0f);
  const Floats n = fma(c, Floats(1.44269504f), magic) - magic;
  const Floats r = fma(n, Floats(2.12194440e-4f), fma(n, Floats(-0.693359375f), c));
  Floats p(1.9875691500e-4f);
  constexpr float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (float term : terms) p = fma(p, r, Floats(term));
  p = fma(p, r * r, r + Floats(1.0f));
  const auto scale = (__builtin_convertvector(n.raw, Floats::Ints) + 127) << 23;
  const Floats result = p * Floats((Floats::Raw)scale);
  return low ? Floats::Raw{} : result.raw;
}

inline float exp1(float x) { return exp(Floats(x)).first(); }

inline Floats sigmoid(Floats x) { return Floats(1.0f) / (Floats(1.0f) + exp(Floats::zero() - x)); }

inline Floats tanh(Floats x) {
  const Floats e = exp(Floats(-2.0f) * abs(x));
  return copysign((Floats(1.0f) - e) / (Floats(1.0f) + e), x);
}

// Abramowitz and Stegun 7.1.26; absolute error 2e-7.
inline Floats erf(Floats x) {
  const Floats a = abs(x), t = Floats(1.0f) / fma(Floats(0.3275911f), a, Floats(1.0f));
  Floats p(1.061405429f);
  constexpr float terms[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  for (float term : terms) p = fma(p, t, Floats(term));
  return copysign(Floats(1.0f) - p * t * exp(Floats::zero() - a * a), x);
}

}  // namespace
}  // namespace kvrun
