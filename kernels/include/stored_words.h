// Stored rows as inputs of a packed product (panel.h), straight from their pages.
//
// A word is four bytes of a row. Words<Stored> says what one word of each of as many rows as there are lanes amounts to: `parts`
// words of a panel, each a float32 or a pair of bfloat16; and what numbers of one row, or of two, are there. Eight bits become
// bfloat16, which holds every one of their codes; the scale of a row of int8 codes is not applied.
#pragma once

#include <type_traits>

#include "panel.h"
#include "stored_rows.h"

namespace kvrun {
namespace {

// `count` numbers of a row from number i on, and zeros.
template <class Stored>
inline Floats some_of(const char* row, int64_t i, int64_t count) {
  if (count >= Floats::width) return Stored::at(row, i);
  char some[Floats::width * sizeof(float)] = {};
  if (count > 0) memcpy(some, row + i * Stored::size, count * Stored::size);
  return Stored::at(some, 0);
}

// Two numbers that bfloat16 holds, in each lane.
inline Floats::Words paired(Floats even, Floats odd) {
  return ((Floats::Words)even.raw >> 16) | ((Floats::Words)odd.raw & 0xffff0000u);
}

template <class Stored>
struct Words {
  using Weight = float;
  static constexpr int parts = 1;
  template <int>
  static Floats::Words part(Floats::Words words) {
    return words;
  }
};

template <>
struct Words<StoredRows<Float16>> {
  using Weight = float;
  static constexpr int parts = 2;
  template <int J>
  static Floats::Words part(Floats::Words words) {
    return (Floats::Words)of_halves(__builtin_convertvector(words >> (16 * J), HalfLanes)).raw;
  }
};

#if defined(__AVX512BW__)
// The bfloat16 of a code without its sign: a float of 8 bits, or an integer as the subnormal numbers of such a float are.
constexpr uint16_t bfloat16_of(int code, int mantissa, int bias, int largest) {
  if (code > largest) return mantissa == 2 && code == 0x7c ? 0x7f80 : 0x7fc0;
  int exponent = code >> mantissa, fraction = code & ((1 << mantissa) - 1);
  if (code == 0) return 0;
  if (exponent == 0)
    for (exponent = 1; !(fraction >> mantissa); fraction <<= 1) exponent--;
  return uint16_t((exponent + 127 - bias) << 7 | (fraction << (7 - mantissa) & 0x7f));
}
struct CodeTable {
  uint16_t of[128];
  constexpr CodeTable(int mantissa, int bias, int largest) : of{} {
    for (int code = 0; code < 128; code++) of[code] = bfloat16_of(code, mantissa, bias, largest);
  }
};
template <class T>
constexpr CodeTable kCodes{3, 7, 0x7e};
template <>
constexpr CodeTable kCodes<Float8E5m2>{2, 15, 0x7b};
template <>
constexpr CodeTable kCodes<Int8Code>{7, -6, 0x7f};

// The bfloat16 of the codes in the lower bytes of halves.
template <class T>
inline __m512i looked_up(__m512i codes) {
  const uint16_t* table = kCodes<T>.of;
  const auto quarter = [&](int i) { return _mm512_loadu_si512(table + 32 * i); };
  const __m512i index = std::is_same<T, Int8Code>::value ? _mm512_abs_epi8(codes) : codes;
  const __m512i low = _mm512_permutex2var_epi16(quarter(0), index, quarter(1));
  const __m512i high = _mm512_permutex2var_epi16(quarter(2), index, quarter(3));
  const __m512i found = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(64)), low, high);
  // The sign from its own place.
  return _mm512_ternarylogic_epi32(found, _mm512_slli_epi16(codes, 8), _mm512_set1_epi16(int16_t(0x8000)), 0xf8);
}

// 32 numbers of a row in bfloat16, `count` of them and zeros.
template <class T>
inline __m512i halves_of(const char* row, int64_t i, int64_t count) {
  if constexpr (std::is_same<T, Bfloat16>::value) return load_halves((const Bfloat16*)row + i, count);
  const __mmask32 some = count < 32 ? (1u << count) - 1 : ~0u;
  return looked_up<T>(_mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, row + i)));
}
#endif

// Bytes 0 and 1, or 2 and 3, of each word as numbers in bfloat16.
template <class T, int J>
inline Floats::Words codes_paired(Floats::Words words) {
#if defined(__AVX512BW__)
  const __m512i lower = _mm512_set1_epi32(2 * J | (2 * J + 1) << 16);
  const __m512i places = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  return (Floats::Words)looked_up<T>(_mm512_shuffle_epi8((__m512i)words, _mm512_add_epi8(lower, places)));
#else
  const auto number = [&](int byte) { return T::widened(to_bytes(words >> (8 * byte) & 0xff)); };
  return paired(number(2 * J), number(2 * J + 1));
#endif
}

template <class T>
struct CodeWords {
  using Weight = Bfloat16;
  static constexpr int parts = 2;
  template <int J>
  static Floats::Words part(Floats::Words words) {
    return codes_paired<T, J>(words);
  }
};

template <>
struct Words<StoredRows<Bfloat16>> : Words<StoredRows<float>> {
  using Weight = Bfloat16;
};
template <>
struct Words<StoredRows<Float8E4m3>> : CodeWords<Float8E4m3> {};
template <>
struct Words<StoredRows<Float8E5m2>> : CodeWords<Float8E5m2> {};
template <>
struct Words<StoredRows<Int8Code>> : CodeWords<Int8Code> {};

}  // namespace
}  // namespace kvrun
