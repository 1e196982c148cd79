// A block of keys and values as a packed product takes its right side (panel.h): keys in panels of 32, whose inputs are the
// head's numbers; values in panels of 32 numbers of the head, whose inputs are the keys.
//
// An input, or a pair of bfloat16 inputs, is a word of a panel; stored rows become such on their way there (stored_words.h).
#pragma once

#include "online_softmax.h"
#include "stored_words.h"

namespace kvrun {
namespace {

// Up to so many bytes, and zeros.
inline Floats::Words load_words(const char* from, int64_t bytes) {
#if defined(__AVX512BW__)
  return (Floats::Words)_mm512_maskz_loadu_epi8(bytes < 64 ? (1ull << bytes) - 1 : ~0ull, from);
#else
  Floats::Words words = {};
  bytes < int64_t(sizeof words) ? memcpy(&words, from, bytes) : memcpy(&words, from, sizeof words);
  return words;
#endif
}

// Word w of each row to to[w], of up to `bytes` bytes and zeros; rows lie `apart`.
#if defined(__AVX2__)
inline void transpose(Floats::Words (&to)[lanes], const char* rows, int64_t apart, int64_t bytes) {
#if defined(__AVX512F__)
  using V = __m512i;
  const auto low32 = [](V a, V b) { return _mm512_unpacklo_epi32(a, b); };
  const auto high32 = [](V a, V b) { return _mm512_unpackhi_epi32(a, b); };
  const auto low64 = [](V a, V b) { return _mm512_unpacklo_epi64(a, b); };
  const auto high64 = [](V a, V b) { return _mm512_unpackhi_epi64(a, b); };
#else
  using V = __m256i;
  const auto low32 = [](V a, V b) { return _mm256_unpacklo_epi32(a, b); };
  const auto high32 = [](V a, V b) { return _mm256_unpackhi_epi32(a, b); };
  const auto low64 = [](V a, V b) { return _mm256_unpacklo_epi64(a, b); };
  const auto high64 = [](V a, V b) { return _mm256_unpackhi_epi64(a, b); };
#endif
  V s[lanes];
#pragma GCC unroll 4
  for (int k = 0; k < lanes; k += 4) {
    V r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) r[i] = (V)load_words(rows + (k + i) * apart, bytes);
    const V a = low32(r[0], r[1]), b = high32(r[0], r[1]), c = low32(r[2], r[3]), d = high32(r[2], r[3]);
    s[k] = low64(a, c);
    s[k + 1] = high64(a, c);
    s[k + 2] = low64(b, d);
    s[k + 3] = high64(b, d);
  }
  // Quarter q of s[k + i] has word 4q + i of the rows from k on; of shorter vectors there are halves.
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
    const V a = _mm512_shuffle_i32x4(s[i], s[4 + i], 0x44), b = _mm512_shuffle_i32x4(s[i], s[4 + i], 0xee);
    const V c = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0x44), d = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0xee);
    to[i] = (Floats::Words)_mm512_shuffle_i32x4(a, c, 0x88);
    to[4 + i] = (Floats::Words)_mm512_shuffle_i32x4(a, c, 0xdd);
    to[8 + i] = (Floats::Words)_mm512_shuffle_i32x4(b, d, 0x88);
    to[12 + i] = (Floats::Words)_mm512_shuffle_i32x4(b, d, 0xdd);
#else
    to[i] = (Floats::Words)_mm256_permute2x128_si256(s[i], s[4 + i], 0x20);
    to[4 + i] = (Floats::Words)_mm256_permute2x128_si256(s[i], s[4 + i], 0x31);
#endif
  }
}
#else
inline void transpose(Floats::Words (&to)[lanes], const char* rows, int64_t apart, int64_t bytes) {
  for (int k = 0; k < lanes; k++) {
    const Floats::Words row = load_words(rows + k * apart, bytes);
    for (int w = 0; w < lanes; w++) to[w][k] = row[w];
  }
}
#endif

// What V vectors of a panel hold for one step: numbers i.. of a row, or of two as pairs; `count` and zeros.
template <class Stored, int V>
inline void step_of(Floats::Words (&to)[V], const char* const* rows, int64_t i, int64_t count) {
  constexpr bool paired_up = std::is_same<typename Words<Stored>::Weight, Bfloat16>::value;
#if defined(__AVX512BW__)
  if constexpr (paired_up) {
    using T = typename Stored::Number;
    const HalfPairs pairs(halves_of<T>(rows[0], i, count), halves_of<T>(rows[1], i, count));
    to[0] = (Floats::Words)pairs.low;
    to[1] = (Floats::Words)pairs.high;
    return;
  }
#endif
  for (int v = 0; v < V; v++) {
    const int64_t at = i + v * lanes, left = count - v * lanes;
    const Floats first = some_of<Stored>(rows[0], at, left);
    to[v] = paired_up ? paired(first, some_of<Stored>(rows[paired_up], at, left)) : (Floats::Words)first.raw;
  }
}

// Where the keys and values of a block lie.
struct Places {
  const char* rows[2 * kBlock];
  const char* const* keys() const { return rows; }
  const char* const* values() const { return rows + kBlock; }
};

// What will be wanted next and the hardware cannot foresee. A processor drops what it is asked for all at once, so parts
// of the work on a block ask for a part of the next.
struct Foresight {
  const Places& next;
  int64_t row_bytes;
  // The same for a product of so many steps to ask for on its way, if these rows lie one after another.
  template <class W>
  Ahead<W> during(int64_t steps, int64_t first, int64_t last) const {
    const char* from = next.rows[first];
    const int64_t bytes = (last - first) * row_bytes;
    if (next.rows[last - 1] == from + bytes - row_bytes) return {(const W*)from, bytes / steps / int64_t(sizeof(W))};
    fetch(first, last);
    return {(const W*)from, 0};
  }
  void fetch(int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; i++)
      for (int64_t at = 0; at < row_bytes; at += 64) prefetch(next.rows[i] + at);
  }
};

// The panels of a block, made of rows of `dim` numbers in pages of so many tokens.
template <class Stored>
struct Packer {
  using From = Words<Stored>;
  using W = typename From::Weight;
  static constexpr int64_t inputs = Widened<W>::inputs;
  W* panels;
  int64_t dim, page_tokens;

  // `count`: whole vectors of them.
  void keys(const char* const* rows, int64_t count, const Foresight& ahead) const {
    const int64_t words = (dim * Stored::size + 3) / 4, steps = (dim + inputs - 1) / inputs;
    for (int64_t j = 0; j < count; j += lanes) {
      ahead.fetch(kBlock + j * 3 / 8, kBlock + (j + lanes) * 3 / 8);
      const bool near = in_one_page(rows + j);
      const int64_t apart = near ? Stored::bytes(dim) : int64_t(sizeof(Floats::Words));
      // What a last vector has too much the next panel overwrites.
      uint32_t* to = (uint32_t*)panels + j / kPanel * steps * kPanel + j % kPanel;
      for (int64_t w = 0; w < words; w += lanes) {
        const int64_t bytes = dim * Stored::size - w * 4;
        Floats::Words block[lanes], copies[lanes];
        if (!near)
          for (int i = 0; i < lanes; i++) copies[i] = load_words(rows[j + i] + w * 4, bytes);
        transpose(block, near ? rows[j] + w * 4 : (const char*)copies, apart, bytes);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++, to += From::parts * kPanel) {
          put<0>(to, block[i]);
          if constexpr (From::parts == 2) put<1>(to + kPanel, block[i]);
        }
      }
    }
  }

  // `numbers`: of each value, the rest of its row being something else.
  void values(const char* const* rows, int64_t count, int64_t numbers, const Foresight& ahead) const {
    for (int64_t j = 0; j < count; j += inputs) {
      ahead.fetch(kBlock + kBlock * 5 / 8 + j * 3 / 8, kBlock + kBlock * 5 / 8 + (j + inputs) * 3 / 8);
      for (int64_t d = 0; d < numbers; d += kPanel) {
        Floats::Words words[kVectors];
        step_of<Stored>(words, rows + j, d, numbers - d);
        memcpy(panels + d * kBlock + j * kPanel, words, sizeof words);
      }
    }
  }

 private:
  // Whether as many rows as there are lanes lie one after another.
  bool in_one_page(const char* const* rows) const {
    return page_tokens % lanes == 0 && rows[lanes - 1] - rows[0] == (lanes - 1) * Stored::bytes(dim);
  }
  template <int J>
  static void put(uint32_t* to, Floats::Words words) {
    const Floats::Words part = From::template part<J>(words);
    memcpy(to, &part, sizeof part);
  }
};

}  // namespace
}  // namespace kvrun
