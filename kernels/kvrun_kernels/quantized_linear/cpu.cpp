// y = x W^T + b over packed codes with scales per group of inputs.
//
// Within a group a sum is one chain of fused multiply-adds over codes, in order; the group's scale then takes it into the
// output's sum, group after group. Codes are decoded in registers, next to the sums: that costs less than to write them
// out and read them again, even for many rows. Every tile forms the same chains, so a row's result does not depend on
// the rows beside it.
#include <utility>

#include "codes.h"
#include "rows.h"

namespace kvrun {
namespace {

constexpr int kVectors = kPanel / Floats::width;
constexpr bool kWide = Floats::width == 16;
constexpr int kSums = kWide ? 24 : 12;
constexpr int kRows = kWide ? 12 : 6;
// As in linear/cpu.cpp: vectors of a panel in one pass, and panels side by side, so that the sums fit the registers.
constexpr int vectors_at_once(int rows) { return kWide || rows > 3 ? 2 : 4; }
constexpr int panels_at_once(int rows) {
  return kWide && rows == 1 ? 4 : 2 * rows * vectors_at_once(rows) <= kSums ? 2 : 1;
}

constexpr int64_t kBlock = 512;  // inputs between two tiles, in whole groups; no group is longer
constexpr int64_t kSlab = 64 * kRows;
constexpr int64_t kPad = 8;  // inputs are padded to this (op.py)

enum Form { kNibbles, kInt8, kFloat8 };
enum Arithmetic { kFloat32, kBfloat16, kRounded };
enum Offsets { kNone = -1, kShift = 3 };  // besides the codes of dtypes

struct Call {
  void* out;
  const void* x;
  const uint8_t* panels;
  const void *scales, *offsets;  // [panels][groups][kPanel]
  const float* table;
  const void* bias;
  int32_t zero;  // the code that stands for nothing, where codes are read without a sign
  int64_t rows, outputs, inputs, stride, group, form, scale_dtype, offset_dtype, out_dtype, bias_dtype;

  int64_t padded() const { return (inputs + kPad - 1) / kPad * kPad; }
  int64_t groups() const { return (inputs + group - 1) / group; }
  int64_t group_end(int64_t g) const { return (g + 1) * group < padded() ? (g + 1) * group : padded(); }
  int64_t panel_bytes() const { return form == kNibbles ? padded() * kPanel / 2 : padded() * kPanel; }
};

inline Floats load_as(const void* from, int64_t dtype, int64_t at) {
  if (dtype == 0) return Floats::load((const float*)from + at);
  if (dtype == 1) return Floats::load((const Bfloat16*)from + at);
  return Floats::load((const Float16*)from + at);
}

inline Floats load_shift(const void* from, int64_t at) {
  typedef int8_t Bytes __attribute__((vector_size(Floats::width)));
  Bytes bytes;
  memcpy(&bytes, (const int8_t*)from + at, sizeof bytes);
  return Floats::Raw(__builtin_convertvector(__builtin_convertvector(bytes, Floats::Ints), Floats::Raw));
}

inline Floats load_offset(const Call& call, int64_t at) {
  if (call.offset_dtype != kShift) return load_as(call.offsets, call.offset_dtype, at);
  return load_as(call.scales, call.scale_dtype, at) * load_shift(call.offsets, at);
}

template <int N, class F, int... I>
inline __attribute__((always_inline)) void unrolled(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// Vectors of a load lie `bytes` of one output apart, but those of Int8Quads in two halves of the load.
template <class S>
constexpr int64_t vector_bytes() {
  return Floats::width * (S::rounds && S::inputs == 4 ? 2 : S::bytes);
}

// What a group's inputs amount to, for each row of a tile: [group][row of the tile].
struct Totals {
  float* inputs;    // their sum, where offsets need it
  float* steps;     // where x is rounded to 8 bits: what one is worth
  int32_t* starts;  // and what the sum of products begins with, so that codes count from `zero`

  Totals from(int64_t at) const { return {inputs + at, steps + at, starts + at}; }
};

// Adds groups [first, last) to the sums [P][R][kPanel] of R rows and P adjacent panels. `codes` begins at group `first`.
template <class S, int R, int P>
void tile(const Call& call, const uint8_t* codes, int64_t panel_bytes, const typename S::X* x, const Totals& totals,
          int64_t panel, int64_t first, int64_t last, float* sums) {
  // Vectors that pass side by side: of a panel, then of the one beside it.
  constexpr int V = vectors_at_once(R), N = P * V, lanes = Floats::width;
  // Beside the chains of a group, registers hold only the sums of a short tile.
  constexpr bool kHeld = kWide && R * N <= 8;
  constexpr int64_t ahead = 4096;
  const int64_t groups = call.groups();
  for (int part = 0; part < kVectors; part += V) {
    const uint8_t* w = codes + part * vector_bytes<S>();
    const typename S::X* at = x;
    const auto place = [&](int r, int i) { return sums + (i / V * R + r) * kPanel + (part + i % V) * lanes; };
    Floats held[R][N];
    if constexpr (kHeld)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) held[r][i] = Floats::load(place(r, i));
    const auto add = [&](int r, int i, Floats by, Floats value) {
      if constexpr (kHeld)
        held[r][i] = fma(by, value, held[r][i]);
      else
        fma(by, value, Floats::load(place(r, i))).store(place(r, i));
    };
    for (int64_t g = first; g < last; g++) {
      const Totals mine = totals.from(g * R);
      typename S::Sum s[R][N];
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) s[r][i] = S::start(mine.starts + r);
      const int64_t loads = (call.group_end(g) - g * call.group) / S::inputs;
      for (int64_t load = 0; load < loads; load++, w += kPanel * S::bytes, at += S::factors * R) {
        // Past its end a panel's stream goes on behind those beside it.
        const uint8_t* next = w + ahead + (w + ahead >= codes + panel_bytes ? (P - 1) * panel_bytes : 0);
        S loaded[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
          prefetch(next + i / V * panel_bytes + i % V * lanes * S::bytes);
          loaded[i] = S(w + i / V * panel_bytes + i % V * vector_bytes<S>(), call.table);
        }
        unrolled<S::factors>(
            [&](auto step) {
              constexpr int J = decltype(step)::value;
              typename S::Factor factor[N];
#pragma GCC unroll 8
              for (int i = 0; i < N; i++) factor[i] = loaded[i].template factor<J>(call.table);
#pragma GCC unroll 12
              for (int r = 0; r < R; r++) {
                const typename S::Spread value(at + J * R + r);
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) s[r][i] = S::add(factor[i], value, s[r][i]);
              }
            },
            std::make_integer_sequence<int, S::factors>{});
      }
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) {
        const int64_t column = ((panel + i / V) * groups + g) * kPanel + (part + i % V) * lanes;
        const Floats scale = load_as(call.scales, call.scale_dtype, column);
        prefetch((const uint8_t*)call.scales + (column + 8 * kPanel) * (call.scale_dtype ? 2 : 4));
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) add(r, i, S::rounds ? scale * Floats(mine.steps[r]) : scale, S::counted(s[r][i]));
      }
      if (call.offset_dtype == kNone) continue;
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) {
        const Floats offset = load_offset(call, ((panel + i / V) * groups + g) * kPanel + (part + i % V) * lanes);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) add(r, i, offset, Floats(mine.inputs[r]));
      }
    }
    if constexpr (kHeld)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) held[r][i].store(place(r, i));
  }
}

template <class S>
using Tile = void (*)(const Call&, const uint8_t*, int64_t, const typename S::X*, const Totals&, int64_t, int64_t, int64_t,
                      float*);

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

// A slab of rows in its layout, tile by tile.
template <class X>
struct Slab {
  Rows rows;
  int64_t row0;
  const X* x;
  Totals totals;
};

// A task: adjacent panels against adjacent tiles.
template <class S>
void multiply(const Call& call, const Slab<typename S::X>& slab, int64_t first_panel, int64_t last_panel, int64_t first_tile,
              int64_t last_tile) {
  const Rows& rows = slab.rows;
  const int64_t across = last_panel - first_panel, tiles = last_tile - first_tile, groups = call.groups();
  const int64_t factors = call.padded() / S::inputs * S::factors;
  const int64_t step = kWide && tiles == 1 ? groups : kBlock / call.group;
  const size_t sum_bytes = tiles * kRows * across * kPanel * sizeof(float);
  float* sums = (float*)scratch(kTask, sum_bytes);
  memset(sums, 0, sum_bytes);
  for (int64_t g = 0; g < groups; g += step) {
    const int64_t last = g + step < groups ? g + step : groups, load = g * call.group / S::inputs;
    for (int64_t t = first_tile; t < last_tile; t++) {
      const int height = rows.height(t), pair = panels_at_once(height);
      const typename S::X* x = slab.x + rows.begin(t) * factors + load * S::factors * height;
      const Totals totals = slab.totals.from(rows.begin(t) * groups);
      float* to = sums + (t - first_tile) * kRows * across * kPanel;
      for (int64_t p = first_panel; p < last_panel;) {
        const int taken = last_panel - p >= pair ? pair : 1;
        const Tile<S> run = taken > 1 ? kTiles<S>.side_by_side[height] : kTiles<S>.one[height];
        const uint8_t* codes = call.panels + p * call.panel_bytes() + load * kPanel * S::bytes;
        run(call, codes, call.panel_bytes(), x, totals, p, g, last, to);
        to += taken * height * kPanel;
        p += taken;
      }
    }
  }
  with_dtype(call.out_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t t = first_tile; t < last_tile; t++) {
      const float* from = sums + (t - first_tile) * kRows * across * kPanel;
      for (int64_t p = first_panel; p < last_panel; p++) {
        const int64_t n = p * kPanel, count = call.outputs - n < kPanel ? call.outputs - n : kPanel;
        for (int64_t r = 0; r < rows.height(t); r++, from += kPanel)
          finish((T*)call.out + (slab.row0 + rows.begin(t) + r) * call.outputs, from, call.bias, call.bias_dtype, n, count);
      }
    }
  });
}

// The sum of each group of a row's inputs, in an order of its own.
template <class T>
void total(const Call& call, const T* row, int height, float* totals) {
  constexpr int lanes = Floats::width;
  for (int64_t g = 0; g < call.groups(); g++) {
    const int64_t end = (g + 1) * call.group < call.inputs ? (g + 1) * call.group : call.inputs;
    Floats all = Floats::zero();
    for (int64_t k = g * call.group; k < end; k += lanes)
      all = all + (end - k >= lanes ? Floats::load(row + k) : Floats::load(row + k, end - k));
    totals[g * height] = sum(all);
  }
}

// A row in 8 bits, group by group: its largest magnitude is 127 steps.
template <class S, class T>
void round_row(const Call& call, const T* row, int height, uint32_t* to, const Totals& totals) {
  constexpr int lanes = Floats::width;
  for (int64_t g = 0; g < call.groups(); g++) {
    const int64_t begin = g * call.group, end = call.group_end(g), last = end < call.inputs ? end : call.inputs;
    Floats most = Floats::zero();
    float x[kBlock];
    for (int64_t k = begin; k < end; k += lanes) {
      const int64_t there = last - k < lanes ? (last > k ? last - k : 0) : lanes;
      const Floats value = there == lanes ? Floats::load(row + k) : Floats::load(row + k, there);
      most = max(most, abs(value));
      value.store(x + (k - begin), end - k < lanes ? end - k : lanes);
    }
    const float top = largest(most), inverse = top > 0 ? 127.0f / top : 0;
    int32_t all = 0;
    int8_t codes[kBlock];
    for (int64_t k = 0; k < end - begin; k++) {
      codes[k] = int8_t(__builtin_rintf(x[k] * inverse));
      all += codes[k];
    }
    for (int64_t k = 0; k < end - begin; k += 4) {
      int8_t bytes[4];
      for (int i = 0; i < 4; i++) bytes[i] = codes[k - k % S::inputs + S::order[k % S::inputs + i]];
      memcpy(to + (begin + k) / 4 * height, bytes, 4);
    }
    totals.steps[g * height] = top / 127.0f;
    totals.inputs[g * height] = float(all) * totals.steps[g * height];
    totals.starts[g * height] = -call.zero * all;
  }
}

template <class S, class T>
void run_slab(const Call& call, int64_t row0, int64_t count) {
  using X = typename S::X;
  const Rows rows(count, kRows);
  const int64_t padded = call.padded(), factors = padded / S::inputs * S::factors, groups = call.groups();
  const bool offsets = call.offset_dtype != kNone;
  X* x = (X*)scratch(kCall, count * factors * sizeof(X) + count * groups * (2 * sizeof(float) + sizeof(int32_t)));
  float* tables = (float*)(x + count * factors);
  const Totals totals{tables, tables + count * groups, (int32_t*)(tables + 2 * count * groups)};
  constexpr int64_t piece = 2048;
  const int64_t pieces = (padded + piece - 1) / piece;
  const auto prepare = [&](int64_t i) {
    const int64_t t = i / pieces, first = i % pieces * piece, last = first + piece < padded ? first + piece : padded;
    const T* from = (const T*)call.x + (row0 + rows.begin(t)) * call.stride;
    const int height = rows.height(t);
    const Totals mine = totals.from(rows.begin(t) * groups);
    if constexpr (S::rounds) {
      for (int r = 0; r < height && first == 0; r++)
        round_row<S>(call, from + r * call.stride, height, x + rows.begin(t) * factors + r, mine.from(r));
    } else {
      lay_out<kRows>(x + rows.begin(t) * factors, from, call.stride, height, first, last, call.inputs);
      for (int r = 0; r < height && offsets && first == 0; r++)
        total(call, from + r * call.stride, height, mine.inputs + r);
    }
  };
  // Waking the others costs more than a few short rows.
  if (count * padded < 32768)
    for (int64_t i = 0; i < rows.tiles * pieces; i++) prepare(i);
  else
    parallel_for(rows.tiles * pieces, prepare);

  const Slab<X> slab{rows, row0, x, totals};
  const int64_t panels = (call.outputs + kPanel - 1) / kPanel, enough = 8 * thread_count();
  int64_t group = rows.tiles == 1 ? panels_at_once(rows.height(0)) : 8;
  while (group > 1 && panels < group * enough) group /= 2;
  const int64_t tasks = (panels + group - 1) / group;
  int64_t cuts = tasks < enough ? enough / tasks : 1;
  if (cuts > rows.tiles) cuts = rows.tiles;
  parallel_for(tasks * cuts, [&](int64_t i) {
    const int64_t first = i / cuts * group, last = first + group < panels ? first + group : panels, cut = i % cuts;
    multiply<S>(call, slab, first, last, rows.tiles * cut / cuts, rows.tiles * (cut + 1) / cuts);
  });
}

template <class S, class T>
void run_all(const Call& call) {
  for (int64_t row = 0; row < call.rows; row += kSlab)
    run_slab<S, T>(call, row, call.rows - row < kSlab ? call.rows - row : kSlab);
}

// x in 8 bits.
void run_rounded(const Call& call) {
  with_dtype(call.out_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
#if defined(__AVX512F__)
    if (has_vnni()) return call.form == kNibbles ? run_all<NibbleQuads<true>, T>(call) : run_all<Int8Quads<true>, T>(call);
#endif
    call.form == kNibbles ? run_all<NibbleQuads<false>, T>(call) : run_all<Int8Quads<false>, T>(call);
  });
}

// codes [outputs, inputs], a byte each, into the layout of codes.h.
void pack(uint8_t* panels, const uint8_t* codes, int64_t outputs, int64_t inputs, bool nibbles) {
  const int64_t padded = (inputs + kPad - 1) / kPad * kPad, count = (outputs + kPanel - 1) / kPanel;
  const int64_t panel_bytes = padded * kPanel / (nibbles ? 2 : 1);
  const int64_t unit = nibbles ? 8 : 2, bytes = nibbles ? 4 : 2;
  parallel_for(count, [&](int64_t p) {
    for (int64_t n = 0; n < kPanel; n++) {
      const int64_t row = p * kPanel + n;
      uint8_t* to = panels + p * panel_bytes + n * bytes;
      for (int64_t k = 0; k < padded; k += unit, to += kPanel * bytes) {
        uint8_t c[8] = {};
        if (row < outputs)
          for (int64_t i = 0; i < unit && k + i < inputs; i++) c[i] = codes[row * inputs + k + i];
        if (nibbles) {
          const uint8_t packed[4] = {uint8_t(c[0] | c[2] << 4), uint8_t(c[4] | c[6] << 4), uint8_t(c[1] | c[3] << 4),
                                     uint8_t(c[5] | c[7] << 4)};
          memcpy(to, packed, 4);
        } else {
          memcpy(to, c, 2);
        }
      }
    }
  });
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(quantized_linear)
(void* out, const void* x, const void* panels, const void* scales, const void* offsets, const void* table, const void* bias,
 int64_t rows, int64_t outputs, int64_t inputs, int64_t stride, int64_t group, int64_t form, int64_t scale_dtype,
 int64_t offset_dtype, int64_t x_dtype, int64_t bias_dtype, int64_t arithmetic) {
  using namespace kvrun;
  Call call{out,  x,       (const uint8_t*)panels, scales, offsets, (const float*)table, bias,         0,       rows,
            outputs, inputs, stride,                 group,  form,    scale_dtype,         offset_dtype, x_dtype, bias_dtype};
  call.zero = form == kInt8 ? 128 : -int32_t(call.table[0]);
  if (arithmetic == kRounded) return run_rounded(call);
#if defined(__AVX512BF16__)
  if (x_dtype == 1 && arithmetic == kBfloat16) {
    uint16_t halves[32];
    for (int i = 0; i < 32; i++) halves[i] = uint16_t(float_to_bits(call.table[i % 16]) >> 16);
    call.table = (const float*)halves;
    if (form == kNibbles) return run_all<NibblesDot, Bfloat16>(call);
    if (form == kInt8) return run_all<Int8Dot, Bfloat16>(call);
  }
#endif
  with_dtype(x_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (form == kNibbles) return run_all<Nibbles, T>(call);
    if (form == kInt8) return run_all<Int8, T>(call);
    run_all<Float8, T>(call);
  });
}

KVRUN_OP(pack_quantized)
(void* panels, const void* codes, int64_t outputs, int64_t inputs, int64_t nibbles) {
  kvrun::pack((uint8_t*)panels, (const uint8_t*)codes, outputs, inputs, nibbles);
}
