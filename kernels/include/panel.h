// Products with a weight that lies packed in panels of 32 output rows (linear/op.py).
//
// A tile of up to kRows rows of x meets a panel: its sums stay in registers while the panel streams past once. One sum
// is one chain of fused multiply-adds over the inputs in order, in every shape of tile and however the inputs are cut
// into blocks: that is why a row's result does not depend on the rows beside it, nor on which op multiplied it.
#pragma once

#include "runs.h"

namespace kvrun {
namespace {

constexpr int kPanel = 32;  // as in op.py
constexpr int kVectors = kPanel / Floats::width;

// Sums that fit the registers, with room for the weights and one value of x.
constexpr bool kWide = Floats::width == 16;
constexpr int kSums = kWide ? 24 : 12;
constexpr int kRows = kWide ? 12 : 6;
// Vectors of a panel that one pass covers, for a tile of so many rows; the rest of the panel takes another pass.
constexpr int vectors_at_once(int rows) { return kWide || rows > 3 ? 2 : 4; }
// Panels that stream side by side: the few sums of a short tile would wait for their own latency.
constexpr int panels_at_once(int rows) { return 2 * rows * vectors_at_once(rows) <= kSums ? 2 : 1; }

// Bytes of a panel between two loads and stores of the sums: a piece stays in the first level of cache for the next tile or
// pass.
constexpr int64_t kPiece = 16384;
// Rows of x that are laid out together.
constexpr int64_t kSlab = 64 * kRows;

// A vector of weights, and how one step of a sum uses it with x broadcast to all lanes.
// `inputs`: taken by a step; `values`: of the laid out x that hold them.
template <class W>
struct Widened {
  using Weight = W;
  using X = float;
  static constexpr int inputs = 1, values = 1;
  struct Spread {
    Floats x;
    Spread(const float* from, int) : x(*from) {}
  };
  Floats w;
  Widened() = default;
  explicit Widened(const W* from) : w(Floats::load(from)) {}
  Floats add(const Spread& x, Floats sum) const { return fma(w, x.x, sum); }
};

template <>
struct Widened<Bfloat16> {
  using Weight = Bfloat16;
  using X = float;
  static constexpr int inputs = 2, values = 2;
  struct Spread {
    Floats even, odd;
    Spread(const float* from, int rows) : even(*from), odd(from[rows]) {}
  };
  Floats even, odd;
  Widened() = default;
  explicit Widened(const Bfloat16* from) {
    Floats::Words words;
    memcpy(&words, from, sizeof words);
    even = (Floats::Raw)(words << 16);
    odd = (Floats::Raw)(words & 0xffff0000u);
  }
  Floats add(const Spread& x, Floats sum) const { return fma(odd, x.odd, fma(even, x.even, sum)); }
};

#if defined(__AVX512BW__)
// Up to 32 numbers of 16 bits, and zeros.
inline __m512i load_halves(const void* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(count < 32 ? (1u << (count > 0 ? count : 0)) - 1 : ~0u, from);
}

// Numbers of an even input and of the odd one after it, side by side for the outputs that they belong to.
struct HalfPairs {
  __m512i low, high;  // of the first 16 outputs, and the others
  HalfPairs(__m512i even, __m512i odd) {
    alignas(64) static constexpr uint16_t order[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    low = _mm512_permutex2var_epi16(even, _mm512_load_si512(order), odd);
    high = _mm512_permutex2var_epi16(even, _mm512_load_si512(order + 32), odd);
  }
};
#endif

#if defined(__AVX512BF16__)
// Both factors bfloat16: one instruction multiplies and adds a pair of inputs, in the same order for every tile.
struct Dot {
  using Weight = Bfloat16;
  using X = uint32_t;
  static constexpr int inputs = 2, values = 1;
  struct Spread {
    __m512bh x;
    Spread(const uint32_t* from, int) : x((__m512bh)_mm512_set1_epi32(int(*from))) {}
  };
  __m512bh w;
  Dot() = default;
  explicit Dot(const Bfloat16* from) : w((__m512bh)_mm512_loadu_si512(from)) {}
  Floats add(const Spread& x, Floats sum) const { return Floats::Raw(_mm512_dpbf16_ps(sum.raw, w, x.x)); }
};
#endif

// Where a pass over a piece of panel reads ahead for those that follow it, and how far that moves on with each step.
template <class W>
struct Ahead {
  const W* from;
  int64_t step;
};

// Adds `steps` steps to the sums [P][R][kPanel] of R rows and P adjacent panels.
// Values of a step lie beside each other, or where kRow is not 1, a row's do and rows so far apart.
template <class S, int R, int P, int kRow = 1>
void tile(const typename S::Weight* panel, int64_t panel_size, const typename S::X* x, int64_t steps, float* sums, bool resume,
          Ahead<typename S::Weight> ahead) {
  constexpr int V = vectors_at_once(R), lanes = Floats::width, after = kRow == 1 ? R : 1;
  for (int part = 0; part < kVectors; part += V) {
    Floats s[P][R][V];
    for (int p = 0; p < P; p++)
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
          s[p][r][v] = resume ? Floats::load(sums + (p * R + r) * kPanel + (part + v) * lanes) : Floats::zero();
    const typename S::Weight *w = panel + part * lanes * S::inputs, *next = ahead.from + part * lanes * S::inputs;
    const typename S::X* at = x;
    for (int64_t step = 0; step < steps; step++, w += kPanel * S::inputs, next += ahead.step, at += after * S::values) {
      S weights[P][V];
#pragma GCC unroll 2
      for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          prefetch(next + p * panel_size + v * lanes * S::inputs);
          weights[p][v] = S(w + p * panel_size + v * lanes * S::inputs);
        }
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const typename S::Spread value(at + r * kRow, after);
#pragma GCC unroll 2
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) s[p][r][v] = weights[p][v].add(value, s[p][r][v]);
      }
    }
    for (int p = 0; p < P; p++)
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) s[p][r][v].store(sums + (p * R + r) * kPanel + (part + v) * lanes);
  }
}

template <class S>
using Tile = void (*)(const typename S::Weight*, int64_t, const typename S::X*, int64_t, float*, bool,
                      Ahead<typename S::Weight>);

// With one panel, and with as many side by side as suit the height.
template <class S, int kRow = 1>
constexpr auto kTiles = by_height<kRows>([](auto height) -> Tile<S> { return tile<S, height(), 1, kRow>; });
template <class S>
constexpr auto kSideBySide = by_height<kRows>([](auto height) -> Tile<S> { return tile<S, height(), panels_at_once(height())>; });

// Calls f(Type<S>{}, Type<T>{}) with how a step multiplies, and the type of x.
template <class F>
inline void with_step(int64_t x_dtype, int64_t weight_dtype, F&& f) {
#if defined(__AVX512BF16__)
  if (x_dtype == 1 && weight_dtype == 1) return f(Type<Dot>{}, Type<Bfloat16>{});
#endif
  with_dtype(x_dtype, [&](auto x_type) {
    with_dtype(weight_dtype, [&](auto weight_type) { f(Type<Widened<typename decltype(weight_type)::type>>{}, x_type); });
  });
}

// One weight against one run of rows, and where the results go.
struct Product {
  void* out;  // of the first row
  const void *x, *panels, *bias;
  int64_t outputs, inputs, stride, out_dtype, bias_dtype;

  // The same from another row on, of x and of the results, both of type T.
  template <class T>
  Product from(int64_t row) const {
    Product other = *this;
    other.x = (const T*)x + row * stride;
    other.out = (T*)out + row * outputs;
    return other;
  }
};

// How many steps of S the inputs make.
template <class S>
int64_t steps_of(int64_t inputs) {
  return (inputs + S::inputs - 1) / S::inputs;
}

// Rounds the sums of a tile and a panel to their place in the output.
inline void store(const Product& product, const Rows& rows, int64_t tile, int64_t panel, const float* sums) {
  const int64_t n = panel * kPanel, count = product.outputs - n < kPanel ? product.outputs - n : kPanel;
  with_dtype(product.out_dtype, [&](auto type) {
    auto* out = (typename decltype(type)::type*)product.out + rows.begin(tile) * product.outputs;
    for (int64_t r = 0; r < rows.height(tile); r++)
      finish(out + r * product.outputs, sums + r * kPanel, product.bias, product.bias_dtype, n, count);
  });
}

// A task: the panels `across` against the tiles `down`. A panel streams past once: piece after piece meets every tile, and while it
// does, their passes share in fetching the next.
template <class S>
void multiply(const Product& product, const Rows& rows, const typename S::X* x, Span across, Span down) {
  using W = typename S::Weight;
  constexpr int64_t step_size = kPanel * S::inputs, piece = kPiece / (step_size * sizeof(W));
  const int64_t steps = steps_of<S>(product.inputs), panel_size = steps * step_size, tiles = down.last - down.first;
  const bool streaming = kWide && tiles == 1;
  // Far enough ahead for memory to answer, and across the pages where the hardware stops.
  const int64_t block = streaming ? steps : piece, reach = streaming ? 4096 / sizeof(W) : block * step_size;
  const int pair = tiles == 1 ? panels_at_once(rows.height(down.first)) : 1;
  float* sums = (float*)scratch(kTask, tiles * kRows * pair * kPanel * sizeof(float));
  for (int64_t p = across.first; p < across.last;) {
    const int taken = across.last - p >= pair ? pair : 1;
    const W* panel = (const W*)product.panels + p * panel_size;
    for (int64_t step = 0; step < steps; step += block) {
      const int64_t count = steps - step < block ? steps - step : block;
      for (int64_t t = 0; t < tiles; t++) {
        const int height = rows.height(down.first + t);
        const Tile<S> run = taken > 1 ? kSideBySide<S>[height] : kTiles<S>[height];
        const W* from = panel + step * step_size;
        const Ahead<W> ahead{from + reach + count * step_size * t / tiles, step_size / tiles};
        const typename S::X* tile_x = x + (rows.begin(down.first + t) * steps + step * height) * S::values;
        run(from, panel_size, tile_x, count, sums + t * kRows * kPanel, step > 0, ahead);
      }
    }
    for (int64_t t = 0; t < tiles; t++)
      for (int n = 0; n < taken; n++)
        store(product, rows, down.first + t, p + n, sums + (t * kRows + n * rows.height(down.first + t)) * kPanel);
    p += taken;
  }
}

// A product as runs.h shares it: how a step multiplies, and the type of x.
template <class S, class T>
struct Packed : Product {
  static constexpr int64_t kInputs = 2048;  // of a piece

  static int panels_at_once(int height) { return kvrun::panels_at_once(height); }
  int64_t panel_count() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t padded() const { return steps_of<S>(inputs) * S::inputs; }
  int64_t values() const { return steps_of<S>(inputs) * S::values; }
  int64_t bytes(const Rows& rows) const { return rows.count * values() * sizeof(typename S::X); }
  int64_t pieces(const Rows& rows) const { return rows.tiles * ((padded() + kInputs - 1) / kInputs); }

  void prepare(const Rows& rows, void* to, int64_t piece) const {
    const int64_t across = (padded() + kInputs - 1) / kInputs, t = piece / across, first = piece % across * kInputs;
    const int64_t last = first + kInputs < padded() ? first + kInputs : padded();
    const T* from = (const T*)x + rows.begin(t) * stride;
    lay_out<kRows>((typename S::X*)to + rows.begin(t) * values(), from, stride, rows.height(t), first, last, inputs);
  }

  void multiply(const Rows& rows, void* laid, Span across, Span down) const {
    kvrun::multiply<S>(*this, rows, (const typename S::X*)laid, across, down);
  }
};

}  // namespace
}  // namespace kvrun
