// y[rows, columns] += (x a^T) bt for segments of rows, each with its own adapter and rank.
//
// Shrink: t = x a^T, four rows and four ranks at a time. Expand: y += t bt, four rows and a span of columns at a time, to
// which four ranks after four are added: weights stream past in long pieces. Where there are enough blocks of rows, a task
// does both for one of them. A single row and a run of rows form each sum in the same order.
#include <type_traits>

#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

constexpr int lanes = Floats::width;
constexpr int64_t kBlock = 4;    // rows, and ranks, of a shrink task
constexpr int64_t kSpan = 1024;  // columns of an expand task

// As laid out by op.py.
struct Segment {
  int64_t start, stop;
  const void *a, *bt;
  int64_t rank, columns, column;

  int64_t rows() const { return stop - start; }
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

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

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
struct Ahead {
  const W* from;
  int64_t stride;

  void fetch(int row, int64_t at) const { prefetch(from + row * stride + at); }
};

// Dot products of R rows with four ranks, t[row][rank].
template <int R, class X, class W>
void shrink(float* t, int64_t rank, const X* x, int64_t x_stride, const W* a, int64_t ranks, int64_t inputs, Ahead<W> ahead) {
  Floats sums[R][kBlock];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < kBlock; j++) sums[r][j] = Floats::zero();
  // Ranks past the end repeat the last one; their sums are dropped.
  const W* row[kBlock];
  for (int j = 0; j < kBlock; j++) row[j] = a + at_most(j, ranks - 1) * inputs;
  const int64_t whole = inputs / lanes * lanes;
  for (int64_t k = 0; k < whole; k += lanes) {
    Floats w[kBlock];
    for (int j = 0; j < kBlock; j++) {
      ahead.fetch(j, k);
      w[j] = Floats::load(row[j] + k);
    }
    for (int r = 0; r < R; r++) {
      const Floats value = Floats::load(x + r * x_stride + k);
      for (int j = 0; j < kBlock; j++) sums[r][j] = fma(value, w[j], sums[r][j]);
    }
  }
  if (const int64_t rest = inputs - whole)
    for (int r = 0; r < R; r++) {
      const Floats value = Floats::load(x + r * x_stride + whole, rest);
      for (int j = 0; j < kBlock; j++) sums[r][j] = fma(value, Floats::load(row[j] + whole, rest), sums[r][j]);
    }
  for (int r = 0; r < R; r++) {
    float out[kBlock];
    sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], out);
    memcpy(t + r * rank, out, ranks * sizeof(float));
  }
}

// Adds what J ranks give `count` columns of R rows to sums [row][kSpan], which begin at nothing with the first of them.
template <int R, int J, class W>
void expand(float* sums, bool first, const float* t, int64_t rank, const W* bt, int64_t columns, int64_t count,
            Ahead<W> ahead) {
  Floats by[R][J];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) by[r][j] = Floats(t[r * rank + j]);
  for (int64_t n = 0; n < count; n += lanes) {
    const bool whole = n + lanes <= count;
    Floats w[J];
    for (int j = 0; j < J; j++) {
      ahead.fetch(j, n);
      const W* from = bt + j * columns + n;
      w[j] = whole ? Floats::load(from) : Floats::load(from, count - n);
    }
    for (int r = 0; r < R; r++) {
      Floats sum = first ? Floats::zero() : Floats::load(sums + r * kSpan + n);
      for (int j = 0; j < J; j++) sum = fma(by[r][j], w[j], sum);
      sum.store(sums + r * kSpan + n);
    }
  }
}

// Up to kBlock rows of a segment.
template <class X, class Y, class W>
struct Part {
  const Call& call;
  const Segment& segment;
  int64_t row, rows = at_most(segment.rows() - row, kBlock);
  const W *a = (const W*)segment.a, *bt = (const W*)segment.bt;

  Part(const Call& c, const Segment& s, int64_t block) : call(c), segment(s), row(block * kBlock) {}

  // t [row][rank] at four ranks.
  void shrink(float* t, int64_t first) const {
    const int64_t ranks = at_most(segment.rank - first, kBlock);
    const X* x = (const X*)call.x + (segment.start + row) * call.x_stride;
    const W* from = a + first * call.inputs;
    const bool last = first + kBlock >= segment.rank;
    const Ahead<W> ahead = last ? Ahead<W>{bt, segment.columns} : Ahead<W>{from + kBlock * call.inputs, call.inputs};
    by_rows([&](auto height) {
      kvrun::shrink<height(), X, W>(t + first, segment.rank, x, call.x_stride, from, ranks, call.inputs, ahead);
    });
  }

  // Adds t bt to kSpan columns of y.
  void expand(const float* t, int64_t column) const {
    const int64_t count = at_most(segment.columns - column, kSpan), rank = segment.rank, columns = segment.columns;
    Y* y = (Y*)call.y + (segment.start + row) * call.y_stride + segment.column + column;
    by_rows([&](auto height) {
      constexpr int R = height();
      float sums[R * kSpan];
      int64_t j = 0;
      for (; j + kBlock <= rank; j += kBlock) {
        const W* from = bt + j * columns + column;
        // After the last ranks come the first ones of the next columns.
        const Ahead<W> ahead{j + kBlock < rank ? from + kBlock * columns : bt + column + kSpan, columns};
        kvrun::expand<R, kBlock>(sums, j == 0, t + j, rank, from, columns, count, ahead);
      }
      for (; j < rank; j++) {
        const W* from = bt + j * columns + column;
        kvrun::expand<R, 1>(sums, j == 0, t + j, rank, from, columns, count, Ahead<W>{from, 0});
      }
      for (int r = 0; r < R; r++)
        for (int64_t n = 0; n < count; n += lanes) {
          Y* to = y + r * call.y_stride + n;
          const Floats sum = Floats::load(sums + r * kSpan + n);
          if (n + lanes <= count)
            (Floats::load(to) + sum).store(to);
          else
            (Floats::load(to, count - n) + sum).store(to, count - n);
        }
    });
  }

 private:
  template <class F>
  void by_rows(const F& f) const {
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
    end.part += segment.row_blocks();
    end.shrink += segment.shrink_tasks();
    end.expand += segment.expand_tasks();
    end.product += segment.rows() * segment.rank;
  }
  using Rows = Part<X, Y, W>;
  if (end.part >= 4 * thread_count()) {
    parallel_for(end.part, [&](int64_t i) {
      const int64_t s = find(call, &Offsets::part, i);
      const Segment& segment = call.segments[s];
      const Rows part(call, segment, i - call.offsets[s].part);
      float* t = (float*)scratch(kTask, kBlock * segment.rank * sizeof(float));
      for (int64_t rank = 0; rank < segment.rank; rank += kBlock) part.shrink(t, rank);
      for (int64_t column = 0; column < segment.columns; column += kSpan) part.expand(t, column);
    });
    return;
  }
  // Too few rows for all threads: they share ranks, then columns.
  call.products = (float*)scratch(kCall, end.product * sizeof(float));
  const auto product = [&](int64_t s, const Rows& part) {
    return call.products + call.offsets[s].product + part.row * call.segments[s].rank;
  };
  parallel_for(end.shrink, [&](int64_t i) {
    const int64_t s = find(call, &Offsets::shrink, i), at = i - call.offsets[s].shrink, blocks = call.segments[s].row_blocks();
    const Rows part(call, call.segments[s], at % blocks);
    part.shrink(product(s, part), at / blocks * kBlock);
  });
  parallel_for(end.expand, [&](int64_t i) {
    const int64_t s = find(call, &Offsets::expand, i), at = i - call.offsets[s].expand, blocks = call.segments[s].row_blocks();
    const Rows part(call, call.segments[s], at % blocks);
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
