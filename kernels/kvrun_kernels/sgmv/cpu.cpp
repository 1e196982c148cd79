// y[rows, columns] += (x a^T) bt for segments of rows, each with its own adapter and rank.
//
// Shrink: t = x a^T, four rows and four ranks at a time. Expand: y += t bt. Of few rows four at a time and a span of columns, to
// which four ranks after four are added: weights stream past in long pieces. Of many, by tiles (panel.h), against 32 columns of
// all ranks, widened once for all of them. Where there are enough blocks of rows, a task does both for one of them. A single
// row and a run of rows form each sum in the same order.
#include <type_traits>

#include "panel.h"

namespace kvrun {
namespace {

constexpr int lanes = Floats::width;
constexpr int64_t kBlock = 4;    // rows, and ranks, of a shrink task
constexpr int64_t kSpan = 1024;  // columns of an expand task
constexpr int64_t kMostRows = 4 * kRows;

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// As laid out by op.py.
struct Segment {
  int64_t start, stop;
  const void *a, *bt;
  int64_t rank, columns, column;

  int64_t rows() const { return stop - start; }
  // Rows of a task that both shrinks and expands: with tiles where a segment fills some for every thread.
  int64_t part_rows() const {
    const int64_t each = rows() / (4 * thread_count());
    return each < kRows ? rows() < kRows ? kBlock : kRows : at_most(each / kRows * kRows, kMostRows);
  }
  int64_t parts() const { return (rows() + part_rows() - 1) / part_rows(); }
  int64_t row_blocks() const { return (rows() + kBlock - 1) / kBlock; }
  int64_t shrink_tasks() const { return row_blocks() * ((rank + kBlock - 1) / kBlock); }
  int64_t expand_tasks() const { return row_blocks() * ((columns + kSpan - 1) / kSpan); }
};

// Where a segment's tasks, and its part of t, begin.
struct Offsets {
  int64_t part, shrink, expand, product;
};

struct Call {
  void* y;
  const void* x;
  const Segment* segments;
  int64_t count, y_stride, x_stride, inputs;
  Offsets* offsets;
  float* products;
};

// The segment that task i belongs to, given where each one's tasks begin.
int64_t find(const Call& call, int64_t Offsets::*begin, int64_t i) {
  int64_t low = 0, high = call.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (call.offsets[middle].*begin <= i ? low : high) = middle;
  }
  // Segments without tasks begin where the next one does; the last of those has them.
  return low;
}

// Four rows of weights that are read after those at hand.
template <class W>
struct Following {
  const W* from;
  int64_t stride;

  void fetch(int row, int64_t at) const { prefetch(from + row * stride + at); }
};

template <class W>
Floats some(const W* from, int64_t count) {
  return count >= lanes ? Floats::load(from) : count > 0 ? Floats::load(from, count) : Floats::zero();
}

// How rows of type X meet weights of type W: in float32.
template <class X, class W>
struct How {
  // A vector of inputs, of a row or of a rank.
  struct Inputs {
    static constexpr int count = lanes;
    Floats v;
    Inputs() = default;
    template <class T>
    Inputs(const T* from, int64_t n) : v(some(from, n)) {}
    Floats add(Inputs other, Floats sum) const { return fma(v, other.v, sum); }
  };
  // The products of rows with as many ranks as a step of an expansion takes, or of one row in all lanes. Step: of tiles.
  struct Ranks {
    using Step = Widened<float>;
    static constexpr int count = 1, vectors = 1;  // of columns that are loaded together
    Floats t;
    Ranks() = default;
    Ranks(Floats first, Floats) : t(first) {}
    static void load(Floats* w, const W* bt, const W*, int64_t columns) { *w = some(bt, columns); }
    Floats add(Floats w, Floats sum) const { return fma(t, w, sum); }
  };
};

#if defined(__AVX512BF16__)
// In pairs of bfloat16, whose two products are added in the same order everywhere; the product in between is rounded to such.
template <>
struct How<Bfloat16, Bfloat16> {
  struct Inputs {
    static constexpr int count = 2 * lanes;
    __m512bh v;
    Inputs() = default;
    Inputs(const Bfloat16* from, int64_t n) : v((__m512bh)load_halves(from, n)) {}
    Floats add(Inputs other, Floats sum) const { return Floats::Raw(_mm512_dpbf16_ps(sum.raw, v, other.v)); }
  };
  struct Ranks {
    using Step = Dot;
    static constexpr int count = 2, vectors = 2;
    Floats::Words t;
    Ranks() = default;
    Ranks(Floats first, Floats second) {
      const auto rounded = [](Floats v) { return (Floats::Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v.raw)); };
      t = rounded(first) | rounded(second) << 16;
    }
    static void load(Floats* w, const Bfloat16* even, const Bfloat16* odd, int64_t columns) {
      const HalfPairs pairs(load_halves(even, columns), load_halves(odd, odd ? columns : 0));
      w[0] = Floats::Raw(_mm512_castsi512_ps(pairs.low));
      w[1] = Floats::Raw(_mm512_castsi512_ps(pairs.high));
    }
    Floats add(Floats w, Floats sum) const { return Floats::Raw(_mm512_dpbf16_ps(sum.raw, (__m512bh)t, (__m512bh)w.raw)); }
  };
};
#endif

// Where the product of a row and a rank goes.
struct Products {
  float* first;
  int64_t row, rank;  // how far apart they lie
};

// Dot products of R rows with four ranks.
template <int R, class X, class W>
void shrink(Products t, const X* x, int64_t x_stride, const W* a, int64_t ranks, int64_t inputs, Following<W> ahead) {
  using V = typename How<X, W>::Inputs;
  Floats sums[R][kBlock];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; j++) sums[r][j] = Floats::zero();
  // Ranks past the end repeat the last one; their sums are dropped.
  const W* row[kBlock];
  for (int j = 0; j < kBlock; j++) row[j] = a + at_most(j, ranks - 1) * inputs;
  // Unrolled everywhere: a loop left anywhere would keep the sums in memory.
  const auto add = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    V w[kBlock];
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; j++) {
      ahead.fetch(j, k);
      w[j] = V(row[j] + k, count);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const V value(x + r * x_stride + k, count);
#pragma GCC unroll 4
      for (int j = 0; j < kBlock; j++) sums[r][j] = value.add(w[j], sums[r][j]);
    }
  };
  int64_t k = 0;
  for (; k + V::count <= inputs; k += V::count) add(k, V::count);
  if (k < inputs) add(k, inputs - k);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    float out[kBlock];
    sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], out);
    for (int64_t j = 0; j < ranks; j++) t.first[r * t.row + j * t.rank] = out[j];
  }
}

// Adds what up to J * Ranks::count ranks give `count` columns of R rows to sums [row][kSpan], which begin at nothing with the
// first of them.
template <int R, int J, class Ranks, class W>
void expand(float* sums, bool first, const float* t, int64_t rank, int64_t ranks, const W* bt, int64_t columns, int64_t count,
            Following<W> ahead) {
  Ranks by[R][J];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) {
      const float* at = t + r * rank + j * Ranks::count;
      by[r][j] = Ranks(Floats(*at), Floats(j * Ranks::count + 1 < ranks ? at[1] : 0.0f));
    }
  const auto add = [&](int64_t n, int64_t some) __attribute__((always_inline)) {
    Floats w[J][Ranks::vectors];
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) {
      const W* from = bt + j * Ranks::count * columns + n;
      for (int i = 0; i < Ranks::count; i++) ahead.fetch(j * Ranks::count + i, n);
      Ranks::load(w[j], from, j * Ranks::count + 1 < ranks ? from + columns : nullptr, some);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < Ranks::vectors; v++) {
        float* at = sums + r * kSpan + n + v * lanes;
        Floats sum = first ? Floats::zero() : Floats::load(at);
        for (int j = 0; j < J; j++) sum = by[r][j].add(w[j][v], sum);
        sum.store(at);
      }
  };
  constexpr int64_t step = Ranks::vectors * lanes;
  int64_t n = 0;
  for (; n + step <= count; n += step) add(n, step);
  if (n < count) add(n, count - n);
}

// Some rows of a segment.
template <class X, class Y, class W>
struct Part {
  using Ranks = typename How<X, W>::Ranks;
  const Call& call;
  const Segment& segment;
  int64_t row, rows;
  const W *a = (const W*)segment.a, *bt = (const W*)segment.bt;

  Part(const Call& c, const Segment& s, int64_t first, int64_t most)
      : call(c), segment(s), row(first), rows(at_most(s.rows() - first, most)) {}

  Y* out(int64_t column) const { return (Y*)call.y + (segment.start + row) * call.y_stride + segment.column + column; }

  // x a^T of `height` rows, at most kBlock, from `from` on, at four ranks.
  void shrink(Products t, int64_t first, int64_t from, int64_t height) const {
    const int64_t ranks = at_most(segment.rank - first, kBlock);
    const X* x = (const X*)call.x + (segment.start + row + from) * call.x_stride;
    const W* w = a + first * call.inputs;
    const bool last = first + kBlock >= segment.rank;
    const Following<W> ahead = last ? Following<W>{bt, segment.columns} : Following<W>{w + kBlock * call.inputs, call.inputs};
    t.first += first * t.rank;
    by_rows(height, [&](auto R) { kvrun::shrink<R(), X, W>(t, x, call.x_stride, w, ranks, call.inputs, ahead); });
  }
  void shrink(float* t, int64_t first) const { shrink({t, segment.rank, 1}, first, 0, rows); }

  // Adds t bt to kSpan columns of y.
  void expand(const float* t, int64_t column) const {
    const int64_t count = at_most(segment.columns - column, kSpan), rank = segment.rank, columns = segment.columns;
    Y* y = out(column);
    by_rows(rows, [&](auto height) {
      constexpr int R = height();
      float sums[R * kSpan];
      int64_t j = 0;
      for (; j + kBlock <= rank; j += kBlock) {
        const W* from = bt + j * columns + column;
        // After the last ranks come the first ones of the next columns.
        const Following<W> ahead{j + kBlock < rank ? from + kBlock * columns : bt + column + kSpan, columns};
        kvrun::expand<R, kBlock / Ranks::count, Ranks>(sums, j == 0, t + j, rank, kBlock, from, columns, count, ahead);
      }
      for (; j < rank; j += Ranks::count) {
        const W* from = bt + j * columns + column;
        kvrun::expand<R, 1, Ranks>(sums, j == 0, t + j, rank, rank - j, from, columns, count, Following<W>{from, 0});
      }
      for (int r = 0; r < R; r++) add(y + r * call.y_stride, sums + r * kSpan, count);
    });
  }

  // All of it, by tiles.
  void update() const {
    using Step = typename Ranks::Step;
    using Weight = typename Step::Weight;
    const int64_t rank = segment.rank, steps = steps_of<Step>(rank), columns = segment.columns;
    const Rows tiles(rows, kRows);
    // Vectors of rows may be read and written past a tile's last one.
    float* panel = (float*)scratch(kTask, ((steps + kRows) * kPanel + (rows + 1) * (rank + steps) + 2 * lanes) * sizeof(float));
    float *sums = panel + steps * kPanel, *t = sums + kRows * kPanel, *x = t + (rows + 1) * rank + lanes;
    // A few rows of x stay in the first level of cache while all ranks stream past.
    for (int64_t i = 0; i < tiles.tiles; i++)
      for (int64_t r = 0; r < tiles.height(i); r += kBlock)
        for (int64_t first = 0; first < rank; first += kBlock) {
          const Products to{t + tiles.begin(i) * rank + r, 1, tiles.height(i)};
          shrink(to, first, tiles.begin(i) + r, at_most(tiles.height(i) - r, kBlock));
        }
    for (int64_t i = 0; i < tiles.tiles; i++)
      for (int64_t s = 0, height = tiles.height(i); s < steps; s++)
        for (int64_t r = 0; r < height; r += lanes) {
          const float *first = t + tiles.begin(i) * rank + s * Ranks::count * height + r, *second = first + height;
          const Ranks by(Floats::load(first), (s + 1) * Ranks::count <= rank ? Floats::load(second) : Floats::zero());
          memcpy(x + tiles.begin(i) * steps + s * height + r, &by, sizeof by);
        }
    for (int64_t n = 0; n < columns; n += kPanel) {
      const int64_t count = at_most(columns - n, kPanel);
      for (int64_t s = 0; s < steps; s++)
        for (int64_t v = 0; v < kPanel; v += Ranks::vectors * lanes) {
          const W* from = bt + s * Ranks::count * columns + n + v;
          Floats w[Ranks::vectors];
          Ranks::load(w, from, (s + 1) * Ranks::count <= rank ? from + columns : nullptr, count - v);
          memcpy(panel + s * kPanel + v, w, sizeof w);
        }
      for (int64_t i = 0; i < tiles.tiles; i++) {
        const auto* tile_x = (const typename Step::X*)(x + tiles.begin(i) * steps);
        kTiles<Step>[tiles.height(i)]((const Weight*)panel, 0, tile_x, steps, sums, false, {(const Weight*)panel, 0});
        for (int64_t r = 0; r < tiles.height(i); r++) {
          Y* y = out(n) + (tiles.begin(i) + r) * call.y_stride;
          prefetch(y + 2 * kPanel);
          add(y, sums + r * kPanel, count);
        }
      }
    }
  }

 private:
  static void add(Y* y, const float* sums, int64_t count) {
    int64_t n = 0;
    for (; n + lanes <= count; n += lanes) (Floats::load(y + n) + Floats::load(sums + n)).store(y + n);
    if (n < count) (Floats::load(y + n, count - n) + Floats::load(sums + n)).store(y + n, count - n);
  }
  template <class F>
  static void by_rows(int64_t rows, const F& f) {
    if (rows == 1) return f(std::integral_constant<int, 1>{});
    if (rows == 2) return f(std::integral_constant<int, 2>{});
    if (rows == 3) return f(std::integral_constant<int, 3>{});
    f(std::integral_constant<int, 4>{});
  }
};

template <class X, class Y, class W>
void run(Call call) {
  call.offsets = (Offsets*)scratch(kCallTable, call.count * sizeof(Offsets));
  Offsets end{0, 0, 0, 0};
  for (int64_t s = 0; s < call.count; s++) {
    const Segment& segment = call.segments[s];
    call.offsets[s] = end;
    if (segment.rank == 0) continue;
    end.part += segment.parts();
    end.shrink += segment.shrink_tasks();
    end.expand += segment.expand_tasks();
    end.product += segment.rows() * segment.rank;
  }
  using Taken = Part<X, Y, W>;
  if (end.part >= 4 * thread_count()) {
    parallel_for(end.part, [&](int64_t i) {
      const int64_t s = find(call, &Offsets::part, i);
      const Segment& segment = call.segments[s];
      const int64_t most = segment.part_rows();
      const Taken part(call, segment, (i - call.offsets[s].part) * most, most);
      if (most > kBlock) return part.update();
      float* t = (float*)scratch(kTask, kBlock * segment.rank * sizeof(float));
      for (int64_t rank = 0; rank < segment.rank; rank += kBlock) part.shrink(t, rank);
      for (int64_t column = 0; column < segment.columns; column += kSpan) part.expand(t, column);
    });
    return;
  }
  // Too few rows for all threads: they share ranks, then columns.
  call.products = (float*)scratch(kCall, end.product * sizeof(float));
  const auto product = [&](int64_t s, const Taken& part) {
    return call.products + call.offsets[s].product + part.row * call.segments[s].rank;
  };
  parallel_for(end.shrink, [&](int64_t i) {
    const int64_t s = find(call, &Offsets::shrink, i), at = i - call.offsets[s].shrink, blocks = call.segments[s].row_blocks();
    const Taken part(call, call.segments[s], at % blocks * kBlock, kBlock);
    part.shrink(product(s, part), at / blocks * kBlock);
  });
  parallel_for(end.expand, [&](int64_t i) {
    const int64_t s = find(call, &Offsets::expand, i), at = i - call.offsets[s].expand, blocks = call.segments[s].row_blocks();
    const Taken part(call, call.segments[s], at % blocks * kBlock, kBlock);
    part.expand(product(s, part), at / blocks * kSpan);
  });
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(sgmv)
(void* y, const void* x, const void* segments, int64_t count, int64_t y_stride, int64_t x_stride, int64_t inputs,
 int64_t x_dtype, int64_t y_dtype, int64_t weight_dtype) {
  using namespace kvrun;
  const Call call{y, x, (const Segment*)segments, count, y_stride, x_stride, inputs, nullptr, nullptr};
  with_dtype(x_dtype, [&](auto x_type) {
    with_dtype(y_dtype, [&](auto y_type) {
      with_dtype(weight_dtype, [&](auto weight_type) {
        run<typename decltype(x_type)::type, typename decltype(y_type)::type, typename decltype(weight_type)::type>(call);
      });
    });
  });
}
