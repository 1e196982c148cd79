// How a page pool keeps a vector of numbers: plainly, as floats of 8 bits, or as int8 codes and the scale they share.
// A row depends on its own numbers and nothing else. The codes of the formats are those of stored.py.
#pragma once

#include "vec.h"

namespace kvrun {
namespace {

typedef uint16_t HalfLanes __attribute__((vector_size(2 * Floats::width)));
typedef int8_t CodeLanes __attribute__((vector_size(Floats::width)));

// Signed bytes in wider lanes, and back. Compilers take a conversion over more than one step apart, lane by lane.
#if defined(__AVX512F__)
inline HalfLanes to_halves(CodeLanes v) { return (HalfLanes)_mm256_cvtepi8_epi16((__m128i)v); }
inline Floats::Ints to_words(CodeLanes v) { return (Floats::Ints)_mm512_cvtepi8_epi32((__m128i)v); }
#elif defined(__AVX2__)
inline HalfLanes to_halves(CodeLanes v) { return (HalfLanes)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)&v)); }
inline Floats::Ints to_words(CodeLanes v) { return (Floats::Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)&v)); }
#else
typedef int16_t ShortLanes __attribute__((vector_size(2 * Floats::width)));
inline HalfLanes to_halves(CodeLanes v) { return (HalfLanes)__builtin_convertvector(v, ShortLanes); }
inline Floats::Ints to_words(CodeLanes v) {
  return __builtin_convertvector(__builtin_convertvector(v, ShortLanes), Floats::Ints);
}
#endif
inline CodeLanes to_bytes(Floats::Words v) {
  return __builtin_convertvector(__builtin_convertvector(v, HalfLanes), CodeLanes);
}

inline Floats of_halves(HalfLanes bits) {
  Float16 halves[Floats::width];
  memcpy(halves, &bits, sizeof bits);
  return Floats::load(halves);
}

// Whether a lane is neither infinite nor NaN.
inline Floats::Ints is_finite(Floats x) { return x.raw - x.raw == 0; }

// A float of 8 bits with `mantissa` bits of fraction: the nearest to each lane, the even one of two, the largest where all
// are too small; NaN, the highest code, for what is not finite.
template <int mantissa, int bias, uint32_t largest_code>
inline CodeLanes narrowed(Floats x) {
  using Words = Floats::Words;
  constexpr int dropped = 23 - mantissa;
  const Words bits = (Words)abs(x).raw, rebased = bits - (uint32_t(127 - bias) << 23);
  const Words normal = (rebased + ((1u << (dropped - 1)) - 1) + ((rebased >> dropped) & 1)) >> dropped;
  // The sum's last bit is worth the smallest subnormal.
  const uint32_t magic_bits = uint32_t(127 + 24 - mantissa - bias) << 23;
  const Words subnormal = (Words)(abs(x) + Floats(bits_to_float(magic_bits))).raw - magic_bits;
  Words code = bits < (uint32_t(128 - bias) << 23) ? subnormal : normal;
  code = code > largest_code ? largest_code - Words{} : code;
  code |= (Words)x.raw >> 24 & 0x80;
  return to_bytes(is_finite(x) ? code : 0x7f - Words{});
}

// 4 bits of exponent and 3 of mantissa, no infinity.
struct Float8E4m3 {
  static Floats widened(CodeLanes code) {
    // In the place of a half's exponent and mantissa, subnormal codes too, they are worth a 256th.
    const HalfLanes placed = to_halves(code) << 7;
    // In NaN alone one more carries, which sets the exponent's last missing bit.
    const HalfLanes bits = (placed & 0xbf80) | (((placed & 0x3f80) + 0x80) & 0x4000);
    return of_halves(bits) * Floats(256.0f);
  }
  static CodeLanes from(Floats x) { return narrowed<3, 7, 0x7e>(x); }
};

// 5 bits of exponent and 2 of mantissa: the upper byte of a half.
struct Float8E5m2 {
  static Floats widened(CodeLanes code) { return of_halves(to_halves(code) << 8); }
  static CodeLanes from(Floats x) { return narrowed<2, 15, 0x7b>(x); }
};

// A code from -127 to 127; the row's scale follows its codes.
struct Int8Code {
  static Floats widened(CodeLanes code) { return __builtin_convertvector(to_words(code), Floats::Raw); }
};

// Calls f(begin, count) for a row's whole vectors, then for the rest of it.
template <class F>
inline void by_vectors(int64_t count, const F& f) {
  constexpr int64_t width = Floats::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) f(i, width);
  if (i < count) f(i, count - i);
}

inline CodeLanes load_codes(const char* from, int64_t count) {
  CodeLanes codes = {};
  count == Floats::width ? memcpy(&codes, from, sizeof codes) : memcpy(&codes, from, count);
  return codes;
}

inline void store_codes(char* to, CodeLanes codes, int64_t count) {
  count == Floats::width ? memcpy(to, &codes, sizeof codes) : memcpy(to, &codes, count);
}

template <class T>
inline Floats load_floats(const T* from, int64_t count) {
  return count == Floats::width ? Floats::load(from) : Floats::load(from, count);
}

// Rows of dim numbers of type Number, `scaled` by a float32 of their own or not. `at` widens the vector that begins at number i,
// without the scale; `write` sets the first `count` and zeroes the rest.
template <class T>
struct Rows8 {
  using Number = T;
  static constexpr bool scaled = false;
  static constexpr int64_t size = 1;  // of a number
  static int64_t bytes(int64_t dim) { return dim; }
  static Floats at(const char* row, int64_t i) { return T::widened(load_codes(row + i, Floats::width)); }
  template <class From>
  static void write(char* row, const From* from, int64_t count, int64_t dim) {
    by_vectors(count, [&](int64_t i, int64_t n) { store_codes(row + i, T::from(load_floats(from + i, n)), n); });
    memset(row + count, 0, dim - count);
  }
};

template <class T>
struct StoredRows {
  using Number = T;
  static constexpr bool scaled = false;
  static constexpr int64_t size = sizeof(T);
  static int64_t bytes(int64_t dim) { return dim * size; }
  static Floats at(const char* row, int64_t i) { return Floats::load((const T*)row + i); }
  template <class From>
  static void write(char* row, const From* from, int64_t count, int64_t dim) {
    by_vectors(count, [&](int64_t i, int64_t n) {
      const Floats x = load_floats(from + i, n);
      n == Floats::width ? x.store((T*)row + i) : x.store((T*)row + i, n);
    });
    memset(row + count * sizeof(T), 0, (dim - count) * sizeof(T));
  }
  static void write(char* row, const T* from, int64_t count, int64_t dim) {
    memcpy(row, from, count * sizeof(T));
    memset(row + count * sizeof(T), 0, (dim - count) * sizeof(T));
  }
};

template <>
struct StoredRows<Float8E4m3> : Rows8<Float8E4m3> {};
template <>
struct StoredRows<Float8E5m2> : Rows8<Float8E5m2> {};

template <>
struct StoredRows<Int8Code> : Rows8<Int8Code> {
  static constexpr bool scaled = true;
  static int64_t bytes(int64_t dim) { return dim + int64_t(sizeof(float)); }
  static float scale(const char* row, int64_t dim) {
    float scale;
    memcpy(&scale, row + dim, sizeof scale);
    return scale;
  }
  // The scale is the largest magnitude's 127th; NaN, over codes of 0, where a number is not finite.
  template <class From>
  static void write(char* row, const From* from, int64_t count, int64_t dim) {
    Floats most = Floats::zero(), excess = Floats::zero();
    by_vectors(count, [&](int64_t i, int64_t n) {
      const Floats x = load_floats(from + i, n);
      most = max(abs(x), most);
      excess = excess + (x - x);
    });
    const float scale = sum(excess) == 0 ? largest(most) / 127.0f : bits_to_float(0x7fc00000);
    const bool some = scale > 0;
    by_vectors(count, [&](int64_t i, int64_t n) {
      // Adding 1.5 * 2^23 rounds to an integer. A scale that is itself rounded up from below may pass 127.
      const Floats magic(12582912.0f), x = load_floats(from + i, n) / Floats(scale);
      const Floats within = x.raw > 127.0f ? Floats(127.0f).raw : x.raw < -127.0f ? Floats(-127.0f).raw : x.raw;
      const Floats code = (within + magic) - magic;
      const auto codes = __builtin_convertvector(some ? code.raw : Floats::zero().raw, Floats::Ints);
      store_codes(row + i, to_bytes((Floats::Words)codes), n);
    });
    memset(row + count, 0, dim - count);
    memcpy(row + dim, &scale, sizeof scale);
  }
};

// Calls f(StoredRows<...>{}) with the rows of a format's code.
template <class F>
inline void with_stored_rows(int64_t code, F&& f) {
  if (code == 3)
    f(StoredRows<Float8E4m3>{});
  else if (code == 4)
    f(StoredRows<Float8E5m2>{});
  else if (code == 5)
    f(StoredRows<Int8Code>{});
  else
    with_dtype(code, [&](auto type) { f(StoredRows<typename decltype(type)::type>{}); });
}

}  // namespace
}  // namespace kvrun
