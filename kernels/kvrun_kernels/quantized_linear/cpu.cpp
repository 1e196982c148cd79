// y = x W^T + b over packed codes with scales per group of inputs; for one weight, or for groups of rows with a weight each.
//
// Within a group a sum is one chain of fused multiply-adds over codes, in order; the group's scale then takes it into the
// output's sum, group after group. Codes are decoded in registers, next to the sums: that costs less than to write them
// out and read them again, even for many rows. Every tile forms the same chains, so a row's result does not depend on
// the rows beside it.
#include <utility>

#include "codes.h"
#include "runs.h"

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

// A weight and its bias, as grouped.py lays them out.
struct Weight {
  const uint8_t* panels;
  const void *scales, *offsets;  // [panels][groups][kPanel]
  const float* table;
  const void* bias;
};

struct Call : Weight {
  void* out;
  const void* x;
  int64_t outputs, inputs, stride, group, form, scale_dtype, offset_dtype, out_dtype, bias_dtype;

  // The code that stands for nothing, where codes are read without a sign.
  int32_t zero() const { return form == kInt8 ? 128 : -int32_t(table[0]); }
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

// A task: the panels `across` against the tiles `down`.
template <class S>
void multiply(const Call& call, const Rows& rows, const typename S::X* laid, const Totals& all, Span across, Span down) {
  const int64_t width = across.last - across.first, tiles = down.last - down.first, groups = call.groups();
  const int64_t factors = call.padded() / S::inputs * S::factors;
  const int64_t step = kWide && tiles == 1 ? groups : kBlock / call.group;
  const size_t sum_bytes = tiles * kRows * width * kPanel * sizeof(float);
  float* sums = (float*)scratch(kTask, sum_bytes);
  memset(sums, 0, sum_bytes);
  for (int64_t g = 0; g < groups; g += step) {
    const int64_t last = g + step < groups ? g + step : groups, load = g * call.group / S::inputs;
    for (int64_t t = down.first; t < down.last; t++) {
      const int height = rows.height(t), pair = panels_at_once(height);
      const typename S::X* x = laid + rows.begin(t) * factors + load * S::factors * height;
      const Totals totals = all.from(rows.begin(t) * groups);
      float* to = sums + (t - down.first) * kRows * width * kPanel;
      for (int64_t p = across.first; p < across.last;) {
        const int taken = across.last - p >= pair ? pair : 1;
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
    for (int64_t t = down.first; t < down.last; t++) {
      const float* from = sums + (t - down.first) * kRows * width * kPanel;
      for (int64_t p = across.first; p < across.last; p++) {
        const int64_t n = p * kPanel, count = call.outputs - n < kPanel ? call.outputs - n : kPanel;
        for (int64_t r = 0; r < rows.height(t); r++, from += kPanel)
          finish((T*)call.out + (rows.begin(t) + r) * call.outputs, from, call.bias, call.bias_dtype, n, count);
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
    totals.starts[g * height] = -call.zero() * all;
  }
}

// A product as runs.h shares it: how a load multiplies, and the type of x.
template <class S, class T>
struct Coded : Call {
  using X = typename S::X;
  static constexpr int64_t kInputs = 2048;  // of a piece

  static int panels_at_once(int height) { return kvrun::panels_at_once(height); }
  int64_t panel_count() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t factors() const { return padded() / S::inputs * S::factors; }
  int64_t across() const { return (padded() + kInputs - 1) / kInputs; }
  int64_t bytes(const Rows& rows) const {
    return rows.count * (factors() * sizeof(X) + groups() * (2 * sizeof(float) + sizeof(int32_t)));
  }
  int64_t pieces(const Rows& rows) const { return rows.tiles * across(); }

  Totals totals(const Rows& rows, void* laid) const {
    const int64_t count = rows.count * groups();
    float* tables = (float*)((X*)laid + rows.count * factors());
    return {tables, tables + count, (int32_t*)(tables + 2 * count)};
  }

  void prepare(const Rows& rows, void* laid, int64_t piece) const {
    const int64_t t = piece / across(), first = piece % across() * kInputs;
    const int64_t last = first + kInputs < padded() ? first + kInputs : padded();
    const T* from = (const T*)x + rows.begin(t) * stride;
    const int height = rows.height(t);
    const Totals mine = totals(rows, laid).from(rows.begin(t) * groups());
    X* to = (X*)laid + rows.begin(t) * factors();
    if constexpr (S::rounds) {
      for (int r = 0; r < height && first == 0; r++) round_row<S>(*this, from + r * stride, height, to + r, mine.from(r));
    } else {
      lay_out<kRows>(to, from, stride, height, first, last, inputs);
      for (int r = 0; r < height && offset_dtype != kNone && first == 0; r++)
        total(*this, from + r * stride, height, mine.inputs + r);
    }
  }

  void multiply(const Rows& rows, void* laid, Span across, Span down) const {
    const auto run = [&](const Call& call) {
      kvrun::multiply<S>(call, rows, (const X*)laid, totals(rows, laid), across, down);
    };
    if constexpr (S::halves) {
      // The upper halves of float32, twice: the look-up reads five bits.
      uint16_t table_halves[32];
      for (int i = 0; i < 32; i++) table_halves[i] = uint16_t(float_to_bits(table[i % 16]) >> 16);
      Call call = *this;
      call.table = (const float*)table_halves;
      run(call);
    } else {
      run(*this);
    }
  }
};

// Rows bounds[g] to bounds[g + 1] of x with weights[g].
struct Groups {
  Call shape;
  const Weight* weights;
  const int64_t* bounds;
  int64_t count;
};

template <class S, class T>
void run_all(const Groups& groups) {
  multiply_groups(groups.bounds, groups.count, kSlab, kRows, [&](int64_t g, int64_t row) {
    Coded<S, T> product{groups.shape};
    static_cast<Weight&>(product) = groups.weights[g];
    product.x = (const T*)product.x + row * product.stride;
    product.out = (T*)product.out + row * product.outputs;
    return product;
  });
}

// x in 8 bits.
void run_rounded(const Groups& groups) {
  const bool nibbles = groups.shape.form == kNibbles;
  with_dtype(groups.shape.out_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
#if defined(__AVX512F__)
    if (has_vnni()) return nibbles ? run_all<NibbleQuads<true>, T>(groups) : run_all<Int8Quads<true>, T>(groups);
#endif
    nibbles ? run_all<NibbleQuads<false>, T>(groups) : run_all<Int8Quads<false>, T>(groups);
  });
}

void run(const Groups& groups, int64_t arithmetic) {
  const int64_t form = groups.shape.form, dtype = groups.shape.out_dtype;
  if (arithmetic == kRounded) return run_rounded(groups);
#if defined(__AVX512BF16__)
  if (dtype == 1 && arithmetic == kBfloat16) {
    if (form == kNibbles) return run_all<NibblesDot, Bfloat16>(groups);
    if (form == kInt8) return run_all<Int8Dot, Bfloat16>(groups);
  }
#endif
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (form == kNibbles) return run_all<Nibbles, T>(groups);
    if (form == kInt8) return run_all<Int8, T>(groups);
    run_all<Float8, T>(groups);
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
  const Weight weight{(const uint8_t*)panels, scales, offsets, (const float*)table, bias};
  const Call shape{{}, out, x, outputs, inputs, stride, group, form, scale_dtype, offset_dtype, x_dtype, bias_dtype};
  const int64_t bounds[] = {0, rows};
  run({shape, &weight, bounds, 1}, arithmetic);
}

KVRUN_OP(grouped_quantized_linear)
(void* out, const void* x, const void* weights, const void* bounds, int64_t count, int64_t outputs, int64_t inputs, int64_t stride,
 int64_t group, int64_t form, int64_t scale_dtype, int64_t offset_dtype, int64_t x_dtype, int64_t bias_dtype,
 int64_t arithmetic) {
  using namespace kvrun;
  const Call shape{{}, out, x, outputs, inputs, stride, group, form, scale_dtype, offset_dtype, x_dtype, bias_dtype};
  run({shape, (const Weight*)weights, (const int64_t*)bounds, count}, arithmetic);
}

KVRUN_OP(pack_quantized)
(void* panels, const void* codes, int64_t outputs, int64_t inputs, int64_t nibbles) {
  kvrun::pack((uint8_t*)panels, (const uint8_t*)codes, outputs, inputs, nibbles);
}
