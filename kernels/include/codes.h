// Weights as a panel stores them, and how one load of them becomes factors of a sum. A panel is kPanel output rows,
// stored input by input; a load takes `inputs` inputs of one vector of outputs and yields `factors` factors.
#pragma once

#include "vec.h"

namespace kvrun {
namespace {

constexpr int kPanel = 32;  // as in op.py

// One factor against x broadcast to all lanes: float32, fused.
struct Widened {
  using X = float;
  using Factor = Floats;
  using Sum = Floats;
  static constexpr bool rounds = false;  // x, to 8 bits
  static constexpr bool halves = false;  // the table, to bfloat16
  struct Spread {
    Floats x;
    explicit Spread(const float* from) : x(*from) {}
  };
  static Sum start(const int32_t*) { return Sum::zero(); }
  static Floats add(Factor w, Spread x, Floats sum) { return fma(w, x.x, sum); }
  static Floats counted(Sum sum) { return sum; }
};

// The entry of a table of 16 that bits [shift, shift + 4) of each lane name.
#if defined(__AVX512F__)
inline Floats look_up(Floats::Words words, int shift, const float* table) {
  return Floats::Raw(_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, shift), _mm512_loadu_ps(table)));
}
#elif defined(__AVX2__)
inline Floats look_up(Floats::Words words, int shift, const float* table) {
  const __m256i index = _mm256_srli_epi32((__m256i)words, shift);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  // The fourth bit chooses the half; a blend reads it from the sign.
  return Floats::Raw(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))));
}
#else
inline Floats look_up(Floats::Words words, int shift, const float* table) {
  Floats::Raw found;
  for (int i = 0; i < Floats::width; i++) found[i] = table[words[i] >> shift & 15];
  return found;
}
#endif

// Eight inputs in a word, the even ones in its lower half: (0 2 4 6 1 3 5 7), lowest bits first.
struct Nibbles : Widened {
  static constexpr int inputs = 8, factors = 8, bytes = 4;
  Floats::Words words;
  Nibbles() = default;
  Nibbles(const uint8_t* from, const float*) { memcpy(&words, from, sizeof words); }
  template <int J>
  Floats factor(const float* table) const {
    return look_up(words, J / 2 * 4 + J % 2 * 16, table);
  }
};

// Two inputs in a lane of 16 bits.
struct Int8 : Widened {
  static constexpr int inputs = 2, factors = 2, bytes = 2;
  Floats::Ints lanes;  // the second input above the first, its sign extended
  Int8() = default;
  Int8(const uint8_t* from, const float*) {
    typedef int16_t Halves __attribute__((vector_size(2 * Floats::width)));
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    lanes = __builtin_convertvector(halves, Floats::Ints);
  }
  template <int J>
  Floats factor(const float*) const {
    const Floats::Ints codes = J ? lanes >> 8 : (Floats::Ints)((Floats::Words)lanes << 24) >> 24;
    return Floats::Raw(__builtin_convertvector(codes, Floats::Raw));
  }
};

// Floats of 4 bits of exponent and 3 of mantissa (e4m3fn): in the place of a half's they are worth a 256th, subnormal
// codes too. The scale is 256 times larger for it (op.py).
struct Float8 : Widened {
  static constexpr int inputs = 2, factors = 2, bytes = 2;
  typedef uint16_t Halves __attribute__((vector_size(2 * Floats::width)));
  Halves lanes;  // the second input above the first
  Float8() = default;
  Float8(const uint8_t* from, const float*) { memcpy(&lanes, from, sizeof lanes); }
  template <int J>
  Floats factor(const float*) const {
    const Halves code = J ? lanes : lanes << 8, halves = (code & 0x8000) | (code & 0x7f00) >> 1;
    Float16 stored[Floats::width];
    memcpy(stored, &halves, sizeof halves);
    return Floats::load(stored);
  }
};

#if defined(__AVX512BF16__)
// One factor is a pair of inputs in bfloat16, and so is x: the instruction adds both products, in one order everywhere.
struct Dot {
  using X = uint32_t;
  using Factor = __m512bh;
  using Sum = Floats;
  static constexpr bool rounds = false, halves = false;
  struct Spread {
    __m512bh x;
    explicit Spread(const uint32_t* from) : x((__m512bh)_mm512_set1_epi32(int(*from))) {}
  };
  static Sum start(const int32_t*) { return Sum::zero(); }
  static Floats add(Factor w, Spread x, Floats sum) { return Floats::Raw(_mm512_dpbf16_ps(sum.raw, w, x.x)); }
  static Floats counted(Sum sum) { return sum; }
};

// As Nibbles; the table holds 32 bfloat16, the second half as the first: the look-up reads five bits.
struct NibblesDot : Dot {
  static constexpr int inputs = 8, factors = 4, bytes = 4;
  static constexpr bool halves = true;
  __m512i words;
  NibblesDot() = default;
  NibblesDot(const uint8_t* from, const float*) : words(_mm512_loadu_si512(from)) {}
  template <int J>
  Factor factor(const float* table) const {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * J), _mm512_loadu_si512(table));
  }
};

constexpr int32_t uppers(int lane) { return (4 * lane + 1) | (4 * lane + 3) << 16; }
constexpr Floats::Ints kUppers = {uppers(0), uppers(1), uppers(2),  uppers(3),  uppers(4),  uppers(5),  uppers(6),  uppers(7),
                                  uppers(8), uppers(9), uppers(10), uppers(11), uppers(12), uppers(13), uppers(14), uppers(15)};

// As Int8: every code is a bfloat16, the upper half of its float32.
struct Int8Dot : Dot {
  static constexpr int inputs = 2, factors = 1, bytes = 2;
  __m512bh w;
  Int8Dot() = default;
  Int8Dot(const uint8_t* from, const float*) {
    const __m128i* at = (const __m128i*)from;
    const auto widened = [](__m128i bytes) { return (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); };
    w = (__m512bh)_mm512_permutex2var_epi16(widened(_mm_loadu_si128(at)), (__m512i)kUppers, widened(_mm_loadu_si128(at + 1)));
  }
  template <int>
  Factor factor(const float*) const {
    return w;
  }
};
#endif

// Four products of unsigned by signed bytes, added to each lane. Exact, so every way of it has the same bits.
#if defined(__AVX512F__)
inline bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }
inline Floats::Ints dot_vnni(Floats::Ints sum, Floats::Words codes, Floats::Ints x) {
  // Spelled out: this file is compiled for processors without the instruction too.
  __m512i added = (__m512i)sum;
  __asm__("vpdpbusd %2, %1, %0" : "+v"(added) : "v"(codes), "v"(x));
  return (Floats::Ints)added;
}
using Lanes = __m512i;
inline __m512i multiply_pairs(__m512i a, __m512i b) { return _mm512_madd_epi16(a, b); }
#elif defined(__AVX2__)
using Lanes = __m256i;
inline __m256i multiply_pairs(__m256i a, __m256i b) { return _mm256_madd_epi16(a, b); }
#endif
inline Floats::Ints dot(Floats::Ints sum, Floats::Words codes, Floats::Ints all) {
#if defined(__AVX2__)

  // The bytes at even places, and those at odd ones, as numbers of 16 bits.
  const Floats::Words even_x = ((Floats::Words)(all << 24 >> 24) & 0xffff) | ((Floats::Words)(all << 8 >> 24) << 16);
  const Floats::Words odd_x = ((Floats::Words)(all << 16 >> 24) & 0xffff) | ((Floats::Words)(all >> 24) << 16);
  const Lanes even = multiply_pairs((Lanes)(codes & 0x00ff00ff), (Lanes)even_x);
  const Lanes odd = multiply_pairs((Lanes)(codes >> 8 & 0x00ff00ff), (Lanes)odd_x);
  return sum + (Floats::Ints)even + (Floats::Ints)odd;
#else
  for (int byte = 0; byte < 4; byte++)
    sum += (Floats::Ints)(codes >> (8 * byte) & 0xff) * (all << (24 - 8 * byte) >> 24);
  return sum;
#endif
}

// x in 8 bits, four inputs in a word; codes without a sign, `zero` of which stand for nothing.
template <bool kVnni>
struct Quads {
  using X = uint32_t;
  using Factor = Floats::Words;
  using Sum = Floats::Ints;
  static constexpr bool rounds = true, halves = false;
  struct Spread {
    Floats::Ints x;
    explicit Spread(const uint32_t* from) : x(Floats::Ints{} + int32_t(*from)) {}
  };
  static Sum start(const int32_t* from) { return Sum{} + *from; }
  static Sum add(Factor w, Spread x, Sum sum) {
#if defined(__AVX512F__)
    if constexpr (kVnni) return dot_vnni(sum, w, x.x);
#endif
    return dot(sum, w, x.x);
  }
  static Floats counted(Sum sum) { return Floats::Raw(__builtin_convertvector(sum, Floats::Raw)); }
};

template <bool kVnni>
struct NibbleQuads : Quads<kVnni> {
  static constexpr int inputs = 8, factors = 2, bytes = 4;
  static constexpr int order[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // of a load's inputs in its factors' bytes
  Floats::Words words;
  NibbleQuads() = default;
  NibbleQuads(const uint8_t* from, const float*) { memcpy(&words, from, sizeof words); }
  template <int J>
  Floats::Words factor(const float*) const {
    return words >> (4 * J) & 0x0f0f0f0f;
  }
};

#if defined(__AVX512F__)
constexpr int32_t interleaved(int lane) { return lane | (lane + 16) << 16; }
constexpr Floats::Ints kInterleaved = {interleaved(0),  interleaved(1),  interleaved(2),  interleaved(3),
                                       interleaved(4),  interleaved(5),  interleaved(6),  interleaved(7),
                                       interleaved(8),  interleaved(9),  interleaved(10), interleaved(11),
                                       interleaved(12), interleaved(13), interleaved(14), interleaved(15)};
#endif

// Two steps of pairs in a load.
template <bool kVnni>
struct Int8Quads : Quads<kVnni> {
  static constexpr int inputs = 4, factors = 1, bytes = 4;
  static constexpr int order[4] = {0, 1, 2, 3};
  Floats::Words words;
  Int8Quads() = default;
  Int8Quads(const uint8_t* from, const float*) {
    typedef uint16_t Halves __attribute__((vector_size(2 * Floats::width)));
    Halves first, second;
    memcpy(&first, from, sizeof first);
    memcpy(&second, from + kPanel * 2, sizeof second);
#if defined(__AVX512F__)
    // Lane i of both, side by side.
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)first), (__m256i)second, 1);
    const Floats::Words lanes = (Floats::Words)_mm512_permutexvar_epi16((__m512i)kInterleaved, both);
#else
    const auto widened = [](Halves halves) { return __builtin_convertvector(halves, Floats::Words); };
    const Floats::Words lanes = widened(first) | widened(second) << 16;
#endif
    words = lanes ^ 0x80808080u;
  }
  template <int>
  Floats::Words factor(const float*) const {
    return words;
  }
};

}  // namespace
}  // namespace kvrun
