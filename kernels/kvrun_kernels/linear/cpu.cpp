// y = x W^T + b over a weight packed in panels of 32 output rows.
//
// A tile of up to kRows rows of x meets a panel: its sums stay in registers while the panel streams past once. One sum
// is one chain of fused multiply-adds over the inputs in order, in every shape of tile and however the inputs are cut
// into blocks: that is why a row's result does not depend on the rows beside it.
#include <utility>

#include "thread_pool.h"
#include "vec.h"

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

// Inputs between two loads and stores of the sums. Blocks keep a piece of panel near for the next tile or pass.
constexpr int64_t kBlock = kWide ? 512 : 256;
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

// Adds `steps` steps to the sums [P][R][kPanel] of R rows and P adjacent panels.
template <class S, int R, int P>
void tile(const typename S::Weight* panel, int64_t panel_size, const typename S::X* x, int64_t steps, float* sums,
          bool resume) {
  constexpr int V = vectors_at_once(R), lanes = Floats::width;
  // Far enough ahead for memory to answer, and across the pages where the hardware stops.
  constexpr int64_t ahead = 4096 / sizeof(typename S::Weight);
  for (int part = 0; part < kVectors; part += V) {
    Floats s[P][R][V];
    for (int p = 0; p < P; p++)
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
          s[p][r][v] = resume ? Floats::load(sums + (p * R + r) * kPanel + (part + v) * lanes) : Floats::zero();
    const typename S::Weight* w = panel + part * lanes * S::inputs;
    const typename S::X* at = x;
    for (int64_t step = 0; step < steps; step++, w += kPanel * S::inputs, at += R * S::values) {
      S weights[P][V];
#pragma GCC unroll 2
      for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          const typename S::Weight* from = w + p * panel_size + v * lanes * S::inputs;
          __builtin_prefetch(from + ahead);
          weights[p][v] = S(from);
        }
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const typename S::Spread value(at + r, R);
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
using Tile = void (*)(const typename S::Weight*, int64_t, const typename S::X*, int64_t, float*, bool);

template <class S>
struct Tiles {
  Tile<S> one[kRows + 1] = {};
  Tile<S> side_by_side[kRows + 1] = {};

  template <int... R>
  constexpr explicit Tiles(std::integer_sequence<int, R...>)
      : one{nullptr, tile<S, R + 1, 1>...}, side_by_side{nullptr, tile<S, R + 1, panels_at_once(R + 1)>...} {}
};

template <class S>
constexpr Tiles<S> kTiles{std::make_integer_sequence<int, kRows>{}};

// Up to kSlab rows cut into tiles of nearly equal height.
struct Rows {
  int64_t count, tiles;
  explicit Rows(int64_t n) : count(n), tiles((n + kRows - 1) / kRows) {}
  int64_t begin(int64_t t) const { return count * t / tiles; }
  int height(int64_t t) const { return int(begin(t + 1) - begin(t)); }
};

// x laid out step by step: [input][row of the tile], zero past the last input.
template <class T>
void lay_out(float* to, const T* x, int64_t stride, int height, int64_t first, int64_t last, int64_t inputs) {
  constexpr int lanes = Floats::width;
  float block[kRows][lanes];
  for (int64_t k = first; k < last; k += lanes) {
    const int64_t n = inputs - k < lanes ? inputs - k : lanes;
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
[[maybe_unused]] void lay_out(uint32_t* to, const Bfloat16* x, int64_t stride, int height, int64_t first, int64_t last,
                              int64_t inputs) {
  for (int r = 0; r < height; r++) {
    const Bfloat16* row = x + r * stride;
    for (int64_t k = first; k < last; k += 2) {
      const uint32_t odd = k + 1 < inputs ? row[k + 1].bits : 0;
      to[k / 2 * height + r] = row[k].bits | odd << 16;
    }
  }
}

struct Call {
  void* out;
  const void *x, *panels, *bias;
  int64_t rows, outputs, inputs, stride, out_dtype, bias_dtype;
};

// Adds the bias to one row's sums of one panel, rounds, and stores what lies inside the output.
template <class T>
void finish(const Call& call, int64_t row, int64_t panel, const float* sums) {
  constexpr int lanes = Floats::width;
  T* out = (T*)call.out + row * call.outputs;
  const int64_t first = panel * kPanel, last = first + kPanel < call.outputs ? first + kPanel : call.outputs;
  for (int64_t n = first; n < last; n += lanes, sums += lanes) {
    Floats y = Floats::load(sums);
    const int64_t count = last - n < lanes ? last - n : lanes;
    if (call.bias)
      with_dtype(call.bias_dtype, [&](auto type) {
        using B = typename decltype(type)::type;
        const B* bias = (const B*)call.bias + n;
        y = y + (count == lanes ? Floats::load(bias) : Floats::load(bias, count));
      });
    count == lanes ? y.store(out + n) : y.store(out + n, count);
  }
}

// A task: adjacent panels against adjacent tiles.
template <class S>
void multiply(const Call& call, const Rows& rows, const typename S::X* x, int64_t row0, int64_t first_panel,
              int64_t last_panel, int64_t first_tile, int64_t last_tile) {
  using W = typename S::Weight;
  const int64_t steps = (call.inputs + S::inputs - 1) / S::inputs, panel_size = steps * kPanel * S::inputs;
  const int64_t across = last_panel - first_panel;
  const bool streaming = kWide && last_tile - first_tile == 1;
  const int64_t block = streaming ? steps : kBlock / S::inputs;
  float* sums = (float*)scratch(kTask, (last_tile - first_tile) * kRows * across * kPanel * sizeof(float));
  for (int64_t step = 0; step < steps; step += block) {
    const int64_t count = steps - step < block ? steps - step : block;
    for (int64_t t = first_tile; t < last_tile; t++) {
      const int height = rows.height(t), pair = panels_at_once(height);
      const typename S::X* tile_x = x + rows.begin(t) * steps * S::values + step * height * S::values;
      float* to = sums + (t - first_tile) * kRows * across * kPanel;
      for (int64_t p = first_panel; p < last_panel;) {
        const W* panel = (const W*)call.panels + p * panel_size + step * kPanel * S::inputs;
        const int taken = last_panel - p >= pair ? pair : 1;
        const Tile<S> run = taken > 1 ? kTiles<S>.side_by_side[height] : kTiles<S>.one[height];
        run(panel, panel_size, tile_x, count, to, step > 0);
        to += taken * height * kPanel;
        p += taken;
      }
    }
  }
  with_dtype(call.out_dtype, [&](auto type) {
    for (int64_t t = first_tile; t < last_tile; t++) {
      const float* from = sums + (t - first_tile) * kRows * across * kPanel;
      for (int64_t p = first_panel; p < last_panel; p++)
        for (int64_t r = 0; r < rows.height(t); r++, from += kPanel)
          finish<typename decltype(type)::type>(call, row0 + rows.begin(t) + r, p, from);
    }
  });
}

template <class S, class T>
void run_slab(const Call& call, int64_t row0, int64_t count) {
  using X = typename S::X;
  const Rows rows(count);
  const int64_t steps = (call.inputs + S::inputs - 1) / S::inputs, padded = steps * S::inputs;
  X* x = (X*)scratch(kCall, count * steps * S::values * sizeof(X));
  constexpr int64_t piece = 2048;
  const int64_t pieces = (padded + piece - 1) / piece;
  const auto prepare = [&](int64_t i) {
    const int64_t t = i / pieces, first = i % pieces * piece, last = first + piece < padded ? first + piece : padded;
    const T* from = (const T*)call.x + (row0 + rows.begin(t)) * call.stride;
    lay_out(x + rows.begin(t) * steps * S::values, from, call.stride, rows.height(t), first, last, call.inputs);
  };
  // Waking the others costs more than a few short rows.
  if (count * padded < 32768)
    for (int64_t i = 0; i < rows.tiles * pieces; i++) prepare(i);
  else
    parallel_for(rows.tiles * pieces, prepare);

  const int64_t panels = (call.outputs + kPanel - 1) / kPanel, enough = 8 * thread_count();
  int64_t group = rows.tiles == 1 ? panels_at_once(rows.height(0)) : 8;
  while (group > 1 && panels < group * enough) group /= 2;
  const int64_t groups = (panels + group - 1) / group;
  int64_t cuts = groups < enough ? enough / groups : 1;
  if (cuts > rows.tiles) cuts = rows.tiles;
  parallel_for(groups * cuts, [&](int64_t i) {
    const int64_t first = i / cuts * group, last = first + group < panels ? first + group : panels, cut = i % cuts;
    multiply<S>(call, rows, x, row0, first, last, rows.tiles * cut / cuts, rows.tiles * (cut + 1) / cuts);
  });
}

template <class S, class T>
void run_all(const Call& call) {
  for (int64_t row = 0; row < call.rows; row += kSlab)
    run_slab<S, T>(call, row, call.rows - row < kSlab ? call.rows - row : kSlab);
}

template <class W>
void pack(W* panels, const W* weight, int64_t outputs, int64_t inputs, int64_t stride) {
  constexpr int pair = Widened<W>::inputs;
  const int64_t steps = (inputs + pair - 1) / pair, count = (outputs + kPanel - 1) / kPanel;
  prefer_huge_pages(panels, count * kPanel * steps * pair * sizeof(W));
  parallel_for(count, [&](int64_t p) {
    W* to = panels + p * kPanel * steps * pair;
    for (int64_t k = 0; k < steps * pair; k += pair)
      for (int64_t n = p * kPanel; n < (p + 1) * kPanel; n++)
        for (int64_t i = 0; i < pair; i++) *to++ = n < outputs && k + i < inputs ? weight[n * stride + k + i] : W{};
  });
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(linear)
(void* out, const void* x, const void* panels, const void* bias, int64_t rows, int64_t outputs, int64_t inputs,
 int64_t stride, int64_t x_dtype, int64_t weight_dtype, int64_t bias_dtype) {
  using namespace kvrun;
  const Call call{out, x, panels, bias, rows, outputs, inputs, stride, x_dtype, bias_dtype};
#if defined(__AVX512BF16__)
  if (x_dtype == 1 && weight_dtype == 1) return run_all<Dot, Bfloat16>(call);
#endif
  with_dtype(x_dtype, [&](auto x_type) {
    with_dtype(weight_dtype, [&](auto weight_type) {
      run_all<Widened<typename decltype(weight_type)::type>, typename decltype(x_type)::type>(call);
    });
  });
}

KVRUN_OP(pack_linear)
(void* panels, const void* weight, int64_t outputs, int64_t inputs, int64_t stride, int64_t dtype) {
  using namespace kvrun;
  with_dtype(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    pack((W*)panels, (const W*)weight, outputs, inputs, stride);
  });
}
