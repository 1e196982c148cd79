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
  struct Spread {
    Floats x;
    explicit Spread(const float* from) : x(*from) {}
  };
  static Floats add(Factor w, Spread x, Floats sum) { return fma(w, x.x, sum); }
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
  struct Spread {
    __m512bh x;
    explicit Spread(const uint32_t* from) : x((__m512bh)_mm512_set1_epi32(int(*from))) {}
  };
  static Floats add(Factor w, Spread x, Floats sum) { return Floats::Raw(_mm512_dpbf16_ps(sum.raw, w, x.x)); }
};

// As Nibbles; the table holds 32 bfloat16, the second half as the first: the look-up reads five bits.
struct NibblesDot : Dot {
  static constexpr int inputs = 8, factors = 4, bytes = 4;
  __m512i words;
  NibblesDot() = default;
  NibblesDot(const uint8_t* from, const float*) : words(_mm512_loadu_si512(from)) {}
  template <int J>
  Factor factor(const float* table) const {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * J), _mm512_loadu_si512(table));
  }
};

// As Int8: every code is a bfloat16.
struct Int8Dot : Dot {
  static constexpr int inputs = 2, factors = 1, bytes = 2;
  __m512bh w;
  Int8Dot() = default;
  Int8Dot(const uint8_t* from, const float*) {
    const __m128i* at = (const __m128i*)from;
    const auto widened = [](__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); };
    w = _mm512_cvtne2ps_pbh(widened(_mm_loadu_si128(at + 1)), widened(_mm_loadu_si128(at)));
  }
  template <int>
  Factor factor(const float*) const {
    return w;
  }
};
#endif

}  // namespace
}  // namespace kvrun
