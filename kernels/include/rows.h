// Rows of x as a packed product takes them: cut into tiles of a few rows, each tile laid out input by input.
#pragma once

#include <utility>

#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

// What a maker gives for each height of a tile; it is called with integral constants from 1 to the tallest.
template <class T, int kTallest>
struct ByHeight {
  T made[kTallest];
  constexpr const T& operator[](int height) const { return made[height - 1]; }
};

template <class F, int... I>
constexpr auto by_height(F make, std::integer_sequence<int, I...>) {
  return ByHeight<decltype(make(std::integral_constant<int, 1>{})), sizeof...(I)>{{make(std::integral_constant<int, I + 1>{})...}};
}

template <int kTallest, class F>
constexpr auto by_height(F make) {
  return by_height(make, std::make_integer_sequence<int, kTallest>{});
}

// Up to so many rows are laid out together, in tiles of nearly equal height, at most `tallest`.
struct Rows {
  int64_t count, tiles;
  Rows(int64_t n, int64_t tallest) : count(n), tiles((n + tallest - 1) / tallest) {}
  int64_t begin(int64_t t) const { return count * t / tiles; }
  int height(int64_t t) const { return int(begin(t + 1) - begin(t)); }
};

// Inputs [first, last) of `height` rows of x: [input][row of the tile], zero past the last input.
template <int kTallest, class T>
void lay_out(float* to, const T* x, int64_t stride, int height, int64_t first, int64_t last, int64_t inputs) {
  constexpr int lanes = Floats::width;
  float block[kTallest][lanes];
  for (int64_t k = first; k < last; k += lanes) {
    const int64_t n = inputs - k < lanes ? (inputs > k ? inputs - k : 0) : lanes;
    for (int r = 0; r < height; r++) {
      const T* from = x + r * stride + k;
      (n == lanes ? Floats::load(from) : Floats::load(from, n)).store(block[r]);
    }
    const int64_t end = last - k < lanes ? last - k : lanes;
    for (int64_t i = 0; i < end; i++)
      for (int r = 0; r < height; r++) to[(k + i) * height + r] = block[r][i];
  }
}

// The same for pairs of bfloat16.
template <int kTallest>
[[maybe_unused]] void lay_out(uint32_t* to, const Bfloat16* x, int64_t stride, int height, int64_t first, int64_t last,
                              int64_t inputs) {
  for (int r = 0; r < height; r++) {
    const Bfloat16* row = x + r * stride;
    for (int64_t k = first; k < last; k += 2) {
      const uint32_t even = k < inputs ? row[k].bits : 0, odd = k + 1 < inputs ? row[k + 1].bits : 0;
      to[k / 2 * height + r] = even | odd << 16;
    }
  }
}

// Adds the bias to `count` sums that begin at output n, rounds and stores them. `bias` may be null.
template <class T>
void finish(T* out, const float* sums, const void* bias, int64_t bias_dtype, int64_t n, int64_t count) {
  constexpr int lanes = Floats::width;
  for (int64_t i = 0; i < count; i += lanes) {
    Floats y = Floats::load(sums + i);
    const int64_t left = count - i < lanes ? count - i : lanes;
    if (bias)
      with_dtype(bias_dtype, [&](auto type) {
        using B = typename decltype(type)::type;
        const B* from = (const B*)bias + n + i;
        y = y + (left == lanes ? Floats::load(from) : Floats::load(from, left));
      });
    left == lanes ? y.store(out + n + i) : y.store(out + n + i, left);
  }
}

}  // namespace
}  // namespace kvrun
