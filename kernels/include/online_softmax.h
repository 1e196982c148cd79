// The running softmax that joins blocks of keys: shares of a block's scores, and the state that they move on.
#pragma once

#include "panel.h"

namespace kvrun {
namespace {

// Keys that are scored together, counted from position 0.
constexpr int64_t kBlock = 64;
constexpr int lanes = Floats::width;
constexpr float kMinusInfinity = -__builtin_inff(), kLowest = -__FLT_MAX__;

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// The learned bias of as many keys as there are lanes, the first of them `away` keys past the query.
Floats bias_of(const float* relative, int64_t away, int64_t most) {
  const int64_t first = away + most, last = first + lanes - 1;
  if (first >= 0 && last <= 2 * most) return Floats::load(relative + first);
  float all[lanes];
  for (int64_t i = 0; i < lanes; i++) all[i] = relative[first + i < 0 ? 0 : at_most(first + i, 2 * most)];
  return Floats::load(all);
}

// One row's scores of a block, of which it sees keys `begin` to `end`; its panels lie `apart`.
struct Scored {
  float* scores;
  int64_t apart, begin, end;
  float* at(int64_t j) const { return scores + j / kPanel * apart + j % kPanel; }

  void hide() const {
    for (int64_t j = 0; j < begin; j++) *at(j) = kMinusInfinity;
    for (int64_t j = end; j < kBlock; j++) *at(j) = kMinusInfinity;
  }
  void multiply(const float* scales) const {
    for (int64_t j = 0; j < kBlock; j += lanes) (Floats::load(at(j)) * Floats::load(scales + j)).store(at(j));
  }
  float most() const {
    Floats best = Floats::load(at(0));
    for (int64_t j = lanes; j < kBlock; j += lanes) best = max(Floats::load(at(j)), best);
    return largest(best);
  }
};

// Running output, sum and maximum of each row; lies in memory as [panels of the head][rows][kPanel] [rows][lanes] [rows].
// The sum stays apart by lanes until it is complete; maxima end with a whole vector.
struct State {
  int64_t rows, numbers;
  float *out, *total, *top;
  State(float* memory, int64_t r, int64_t panels)
      : rows(r), numbers(panels * r * kPanel), out(memory), total(memory + numbers), top(total + r * lanes) {}
  static int64_t floats(int64_t rows, int64_t panels) {
    return rows * (panels * kPanel + lanes) + (rows + lanes - 1) / lanes * lanes;
  }
  void clear() {
    memset(out, 0, (numbers + rows * lanes) * sizeof(float));
    for (int64_t r = 0; r < rows; r += lanes) Floats(kMinusInfinity).store(top + r);
  }
  // What a row's output has to be multiplied by, the sum being complete; 0 where it saw no key. A sink is a logit that
  // takes its share of the sum and adds nothing to the output.
  float scale(int64_t r, const float* sink) const {
    const float all = sum(Floats::load(total + r * lanes));
    if (all == 0) return 0.0f;
    if (!sink) return 1.0f / all;
    const float most = *sink > top[r] ? *sink : top[r], keep = exp1(top[r] - most);
    return keep / (all * keep + exp1(*sink - most));
  }
};

// Multiplies `count` numbers by a factor, and adds those of another row times its own.
void scale(float* to, int64_t count, float keep) {
  for (int64_t d = 0; d < count; d += lanes) (Floats::load(to + d) * Floats(keep)).store(to + d);
}
void add_scaled(float* to, float keep, const float* from, float add, int64_t count) {
  for (int64_t d = 0; d < count; d += lanes)
    fma(Floats::load(from + d), Floats(add), Floats::load(to + d) * Floats(keep)).store(to + d);
}

void merge(State into, State next) {
  for (int64_t r = 0; r < into.rows; r++) {
    if (next.top[r] == kMinusInfinity) continue;
    const float top = into.top[r] > next.top[r] ? into.top[r] : next.top[r];
    const float keep = exp1(into.top[r] - top), add = exp1(next.top[r] - top);
    into.top[r] = top;
    add_scaled(into.total + r * lanes, keep, next.total + r * lanes, add, lanes);
    for (int64_t d = r * kPanel; d < into.numbers; d += into.rows * kPanel)
      add_scaled(into.out + d, keep, next.out + d, add, kPanel);
  }
}

// What scores become shares by, and how a block's shares lie for the product with its values: those of a row beside each
// other, keys in order. X is the type that the product takes its left side in.
template <class X>
struct Shares {
  static constexpr int64_t kRow = kBlock;
  static Floats of(Floats x) { return exp(x); }
  static void put(X* to, Floats low, Floats high) {
    low.store(to);
    high.store(to + lanes);
  }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16, which round away more than the shorter polynomial of e^x leaves out: 3e-6 of it.
template <>
struct Shares<uint32_t> {
  static constexpr int64_t kRow = kBlock / 2;
  static Floats of(Floats x) {
    const __m512 log2e = _mm512_set1_ps(1.44269504f);
    const __m512 n = _mm512_roundscale_ps(__m512(x.raw) * log2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats f(Floats::Raw(_mm512_fmsub_ps(x.raw, log2e, n)));
    Floats p(9.570101434e-03f);
    constexpr float terms[] = {5.591786028e-02f, 2.402474484e-01f, 6.931218147e-01f, 9.999992614e-01f};
    for (float term : terms) p = fma(p, f, Floats(term));
    // Only what is not below; NaN is not.
    const __mmask16 some = _mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
    return Floats::Raw(_mm512_maskz_scalef_ps(some, p.raw, n));
  }
  static void put(uint32_t* to, Floats low, Floats high) {
    const __m512bh both = _mm512_cvtne2ps_pbh(high.raw, low.raw);
    memcpy(to, &both, sizeof both);
  }
};
#endif

}  // namespace
}  // namespace kvrun
