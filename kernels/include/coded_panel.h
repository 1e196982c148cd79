// Products with codes that lie packed in panels of 32 output rows, with scales per group of inputs (quantized_linear/op.py).
//
// Within a group a sum is one chain of fused multiply-adds over codes, in order; the group's scale then takes it into the
// output's sum, group after group. Codes are decoded in registers, next to the sums: that costs less than to write them
// out and read them again, even for many rows. Every tile forms the same chains, so a row's result does not depend on
// the rows beside it.
#pragma once

#include "codes.h"
#include "runs.h"

namespace kvrun {
namespace {

constexpr int kVectors = kPanel / Floats::width;
constexpr bool kWide = Floats::width == 16;
constexpr int kSums = kWide ? 24 : 12;
constexpr int kRows = kWide ? 12 : 6;
// As in panel.h: vectors of a panel in one pass, and panels side by side, so that the sums fit the registers.
constexpr int vectors_at_once(int rows) { return kWide || rows > 3 ? 2 : 4; }
constexpr int panels_at_once(int rows) {
  return kWide && rows == 1 ? 4 : 2 * rows * vectors_at_once(rows) <= kSums ? 2 : 1;
}

constexpr int64_t kBlock = 512;  // inputs between two tiles, in whole groups; no group is longer
constexpr int64_t kSlab = 64 * kRows;
constexpr int64_t kPad = 8;  // inputs are padded to this (op.py)

enum Form { kNibbles, kInt8, kFloat8 };
enum { kNone = -1, kBytes = 3 };  // types of scales and offsets besides the codes of dtypes

// A weight and its bias, as grouped.py lays them out.
struct Weight {
  const uint8_t* panels;
  const void *scales, *offsets;  // [panels][groups][kPanel]
  const float* table;
  const Float16* units;  // [panels][blocks][that of scales, that of offsets where they are][kPanel]
  const void* bias;
};

struct Call : Weight {
  void* out;
  const void* x;
  int64_t outputs, inputs, stride, group, form, scale_dtype, offset_dtype, block, out_dtype, bias_dtype;

  // The code that stands for nothing, where codes are read without a sign.
  int32_t zero() const { return form == kInt8 ? 128 : -int32_t(table[0]); }
  int64_t padded() const { return (inputs + kPad - 1) / kPad * kPad; }
  int64_t groups() const { return (inputs + group - 1) / group; }
  // Of a panel's units those before group g; none where scales are no counts. A block is a power of two: a division takes longer
  // than a group's scales.
  int64_t units_before(int64_t g) const {
    return block ? (g >> __builtin_ctzll(block)) * (offset_dtype == kNone ? kPanel : 2 * kPanel) : 0;
  }
  int64_t group_end(int64_t g) const { return (g + 1) * group < padded() ? (g + 1) * group : padded(); }
  int64_t panel_bytes() const { return form == kNibbles ? padded() * kPanel / 2 : padded() * kPanel; }
};

inline Floats load_as(const void* from, int64_t dtype, int64_t at) {
  if (dtype == 0) return Floats::load((const float*)from + at);
  if (dtype == 1) return Floats::load((const Bfloat16*)from + at);
  return Floats::load((const Float16*)from + at);
}

inline Floats load_bytes(const void* from, int64_t at) {
  const int8_t* bytes = (const int8_t*)from + at;
#if defined(__AVX512F__)
  return Floats::Raw(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)bytes))));
#elif defined(__AVX2__)
  return Floats::Raw(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)bytes))));
#else
  Floats::Raw found;
  for (int i = 0; i < Floats::width; i++) found[i] = bytes[i];
  return found;
#endif
}

// Of the vector of outputs that begins at one place among scales and offsets, and at another among units.
inline Floats load_scale(const Call& call, int64_t at, int64_t unit) {
  if (!call.block) return load_as(call.scales, call.scale_dtype, at);
  return load_bytes(call.scales, at) * Floats::load(call.units + unit);
}

inline Floats load_offset(const Call& call, int64_t at, int64_t unit) {
  if (call.offset_dtype != kBytes) return load_as(call.offsets, call.offset_dtype, at);
  if (call.block) return load_bytes(call.offsets, at) * Floats::load(call.units + unit + kPanel);
  return load_as(call.scales, call.scale_dtype, at) * load_bytes(call.offsets, at);
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
  const int64_t groups = call.groups(), units = call.units_before(groups), scale_bytes = call.block ? 1 : call.scale_dtype ? 2 : 4;
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
      const int64_t unit = call.units_before(g);
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
        const Floats scale = load_scale(call, column, (panel + i / V) * units + unit + (part + i % V) * lanes);
        prefetch((const uint8_t*)call.scales + (column + 8 * kPanel) * scale_bytes);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) add(r, i, S::rounds ? scale * Floats(mine.steps[r]) : scale, S::counted(s[r][i]));
      }
      if (call.offset_dtype == kNone) continue;
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) {
        const int64_t column = ((panel + i / V) * groups + g) * kPanel + (part + i % V) * lanes;
        const Floats offset = load_offset(call, column, (panel + i / V) * units + unit + (part + i % V) * lanes);
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
constexpr auto kTiles = by_height<kRows>([](auto height) -> Tile<S> { return tile<S, height(), 1>; });
template <class S>
constexpr auto kSideBySide = by_height<kRows>([](auto height) -> Tile<S> { return tile<S, height(), panels_at_once(height())>; });

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
        const Tile<S> run = taken > 1 ? kSideBySide<S>[height] : kTiles<S>[height];
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

}  // namespace
}  // namespace kvrun
