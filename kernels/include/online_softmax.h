// The arithmetic of attention on float32 blocks: scores, values, and the running softmax that joins block to block.
#pragma once

#include "vec.h"

namespace kvrun {
namespace {

// Keys that are scored together, counted from position 0.
constexpr int64_t kBlock = 64;
constexpr int lanes = Floats::width;
constexpr float kMinusInfinity = -__builtin_inff();

// Running maximum, sum and output of each row; lies in memory as [rows] [rows] [rows][padded].
struct State {
  float *top, *total, *out;
  State(float* memory, int64_t rows) : top(memory), total(memory + rows), out(memory + 2 * rows) {}
  static int64_t floats(int64_t rows, int64_t padded) { return rows * (padded + 2); }
  void clear(int64_t rows, int64_t padded) {
    for (int64_t r = 0; r < rows; r++) top[r] = kMinusInfinity;
    memset(total, 0, rows * sizeof(float));
    memset(out, 0, rows * padded * sizeof(float));
  }
  // What a row's output has to be multiplied by, the sum being complete; 0 where it saw no key. A sink is a logit that
  // takes its share of the sum and adds nothing to the output.
  float scale(int64_t r, const float* sink) const {
    if (total[r] == 0) return 0.0f;
    if (!sink) return 1.0f / total[r];
    const float most = *sink > top[r] ? *sink : top[r], keep = exp1(top[r] - most);
    return keep / (total[r] * keep + exp1(*sink - most));
  }
};

void merge(State into, State next, int64_t rows, int64_t padded) {
  for (int64_t r = 0; r < rows; r++) {
    if (next.total[r] == 0) continue;
    const float top = into.top[r] > next.top[r] ? into.top[r] : next.top[r];
    const float keep = exp1(into.top[r] - top), add = exp1(next.top[r] - top);
    into.top[r] = top;
    into.total[r] = into.total[r] * keep + next.total[r] * add;
    for (int64_t d = 0; d < padded; d += lanes) {
      float* to = into.out + r * padded + d;
      fma(Floats::load(next.out + r * padded + d), Floats(add), Floats::load(to) * Floats(keep)).store(to);
    }
  }
}

// Vectors of a block that were widened beforehand: numbers d.. of vector j.
struct Widened {
  const float* first;
  int64_t stride;
  Floats operator()(int64_t j, int64_t d) const { return Floats::load(first + j * stride + d); }
  void foresee(int64_t, int64_t, int64_t) const {}
};

// Scores of R rows against four keys at a time: each a sum over lanes, folded the same way every time.
template <int R, class Vectors>
void score(const float* q, const Vectors& keys, float* scores, int64_t count, int64_t padded) {
  for (int64_t j = 0; j < count; j += 4) {
    Floats sums[R][4];
    for (int r = 0; r < R; r++)
      for (int k = 0; k < 4; k++) sums[r][k] = Floats::zero();
    for (int k = 0; k < 4; k++) keys.foresee(j + k, 0, padded);
    for (int64_t d = 0; d < padded; d += lanes) {
      Floats key[4];
      for (int k = 0; k < 4; k++) key[k] = keys(j + k, d);
      for (int r = 0; r < R; r++) {
        const Floats query = Floats::load(q + r * padded + d);
        for (int k = 0; k < 4; k++) sums[r][k] = fma(query, key[k], sums[r][k]);
      }
    }
    for (int r = 0; r < R; r++) sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], scores + r * kBlock + j);
  }
}

// out = out * keep + shares x values, for R rows and V vectors of the head from `first` on.
template <int R, int V, class Vectors>
void add_values(float* out, const float* keep, const float* shares, const Vectors& values, int64_t count, int64_t padded,
                int64_t first) {
  Floats sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = Floats::load(out + r * padded + first + v * lanes) * Floats(keep[r]);
  for (int64_t j = 0; j < count; j++) {
    values.foresee(j, first, V * lanes);
    Floats value[V];
    for (int v = 0; v < V; v++) value[v] = values(j, first + v * lanes);
    for (int r = 0; r < R; r++) {
      const Floats share(shares[r * kBlock + j]);
      for (int v = 0; v < V; v++) sums[r][v] = fma(share, value[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v].store(out + r * padded + first + v * lanes);
}

template <int R, class Vectors>
void add_values(float* out, const float* keep, const float* shares, const Vectors& values, int64_t count, int64_t padded) {
  // One row alone needs more sums at once to hide their latency.
  constexpr int V = R == 1 ? 8 : 4;
  int64_t d = 0;
  for (; d + V * lanes <= padded; d += V * lanes) add_values<R, V>(out, keep, shares, values, count, padded, d);
  for (; d < padded; d += lanes) add_values<R, 1>(out, keep, shares, values, count, padded, d);
}

template <class F>
void in_fours(int64_t rows, const F& f) {
  for (int64_t r = 0; r < rows; r += 4) f(r, rows - r < 4 ? int(rows - r) : 4);
}

}  // namespace
}  // namespace kvrun
