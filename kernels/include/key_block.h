// A block of keys and values as a packed product takes its right side (panel.h): keys in panels of 32, whose inputs are the
// head's numbers; values in panels of 32 numbers of the head, whose inputs are the keys.
//
// An input, or a pair of bfloat16 inputs, is a word. Rows of other formats are widened to plain rows first.
#pragma once

#include <type_traits>

#include "online_softmax.h"
#include "stored_rows.h"

namespace kvrun {
namespace {

constexpr int64_t kWords = 16;  // words, and rows, that are transposed at a time

// Word w of row k to to[w * kPanel + k], for kWords rows and at most as many words.
#if defined(__AVX512F__)
inline void transpose(uint32_t* to, const char* const* rows, int64_t offset, int64_t words) {
  const __mmask16 some = __mmask16((1u << words) - 1);
  __m512i s[16], all[16];
  for (int k = 0; k < 16; k += 4) {
    __m512i r[4];
    for (int i = 0; i < 4; i++) r[i] = _mm512_maskz_loadu_epi32(some, rows[k + i] + offset);
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    s[k] = _mm512_unpacklo_epi64(a, c);
    s[k + 1] = _mm512_unpackhi_epi64(a, c);
    s[k + 2] = _mm512_unpacklo_epi64(b, d);
    s[k + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // Quarter q of s[k + i] has word 4q + i of the rows from k on.
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(s[i], s[4 + i], 0x44), b = _mm512_shuffle_i32x4(s[i], s[4 + i], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0x44), d = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0xee);
    all[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    all[4 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    all[8 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    all[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  if (words == kWords)
    for (int w = 0; w < 16; w++) _mm512_storeu_si512(to + w * kPanel, all[w]);
  else
    for (int w = 0; w < words; w++) _mm512_storeu_si512(to + w * kPanel, all[w]);
}
#else
inline void transpose(uint32_t* to, const char* const* rows, int64_t offset, int64_t words) {
  for (int64_t k = 0; k < kWords; k++)
    for (int64_t w = 0; w < words; w++) memcpy(to + w * kPanel + k, rows[k] + offset + 4 * w, 4);
}
#endif

// A panel's part of `numbers` numbers of two rows, as pairs; the others of the panel are zero.
#if defined(__AVX512BW__)
inline void interleave(Bfloat16* to, const Bfloat16* even, const Bfloat16* odd, int64_t numbers) {
  alignas(64) static constexpr uint16_t order[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __mmask32 some = numbers < kPanel ? (1u << numbers) - 1 : ~0u;
  const __m512i a = _mm512_maskz_loadu_epi16(some, even), b = _mm512_maskz_loadu_epi16(some, odd);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, _mm512_load_si512(order), b));
  _mm512_storeu_si512(to + kPanel, _mm512_permutex2var_epi16(a, _mm512_load_si512(order + 32), b));
}
#else
inline void interleave(Bfloat16* to, const Bfloat16* even, const Bfloat16* odd, int64_t numbers) {
  for (int64_t d = 0; d < numbers; d++) {
    to[2 * d] = even[d];
    to[2 * d + 1] = odd[d];
  }
  if (numbers < kPanel) memset(to + 2 * numbers, 0, (kPanel - numbers) * 2 * sizeof(Bfloat16));
}
#endif

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

// The panels of a block, made of rows of `dim` numbers. `plain` has room for kBlock rows of `dim` numbers, rounded up to whole
// vectors.
template <class Stored, class W>
struct Packer {
  W *panels, *plain;
  int64_t dim;
  static constexpr int64_t inputs = Widened<W>::inputs;
  // Whether rows lie in their pages as they are needed, in whole words.
  bool in_place() const { return std::is_same<Stored, StoredRows<W>>::value && dim % inputs == 0; }
  int64_t words() const { return (dim + inputs - 1) / inputs; }

  // Widens the rows' first `numbers` numbers; says where they are then.
  void widen(const char* const* from, int64_t count, int64_t numbers, const char** rows) const {
    const int64_t padded = (numbers + lanes - 1) / lanes * lanes;
    for (int64_t j = 0; j < count; j++) {
      rows[j] = (const char*)(plain + j * padded);
      Stored::read(plain + j * padded, from[j], numbers, dim);
    }
  }

  // `count`: whole kWords of them.
  void keys(const char* const* from, int64_t count, const Foresight& ahead) const {
    const char* widened[kBlock];
    if (!in_place()) widen(from, count, dim, widened);
    const char* const* rows = in_place() ? from : widened;
    for (int64_t j = 0; j < count; j += kWords) {
      uint32_t* to = (uint32_t*)panels + j / kPanel * words() * kPanel + j % kPanel;
      ahead.fetch(kBlock + j * 3 / 8, kBlock + (j + kWords) * 3 / 8);
      for (int64_t w = 0; w < words(); w += kWords)
        transpose(to + w * kPanel, rows + j, w * 4, words() - w < kWords ? words() - w : kWords);
    }
  }

  // `numbers`: of each value, the rest of its row being something else.
  void values(const char* const* from, int64_t count, int64_t numbers, const Foresight& ahead) const {
    const char* widened[kBlock];
    if (!in_place()) widen(from, count, numbers, widened);
    const char* const* rows = in_place() ? from : widened;
    for (int64_t j = 0; j < count; j += inputs) {
      ahead.fetch(kBlock + kBlock * 5 / 8 + j * 3 / 8, kBlock + kBlock * 5 / 8 + (j + inputs) * 3 / 8);
      for (int64_t d = 0; d < numbers; d += kPanel) {
        W* to = panels + d * kBlock + j * kPanel;
        const int64_t some = numbers - d < kPanel ? numbers - d : kPanel;
        if constexpr (inputs == 2)
          interleave(to, (const W*)rows[j] + d, (const W*)rows[j + 1] + d, some);
        else
          for (int64_t v = 0; v < kPanel; v += lanes) load_some((const W*)rows[j] + d + v, some - v).store(to + v);
      }
    }
  }

  static Floats load_some(const W* from, int64_t count) {
    return count >= lanes ? Floats::load(from) : count > 0 ? Floats::load(from, count) : Floats::zero();
  }
};

}  // namespace
}  // namespace kvrun
