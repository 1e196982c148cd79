// y[rows, columns] += (x a^T) bt for segments of rows, each with its own adapter and rank.
//
// Shrink: t = x a^T, tasks over blocks of four rows and four ranks of every segment at once. Expand: y += t bt, tasks
// over blocks of four rows and a span of columns. A single row and a run of rows form each sum in the same order.
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
  int64_t shrink, expand, product;
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

// Dot products of R rows with four ranks, t[row][rank].
template <int R, class X, class W>
void shrink(float* t, int64_t rank, const X* x, int64_t x_stride, const W* a, int64_t ranks, int64_t inputs) {
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
      // The same place of the next block of ranks, most often this thread's next task.
      __builtin_prefetch(row[j] + k + kBlock * inputs);
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

// Adds t bt to R rows, at V vectors of columns of which `count` elements exist.
template <int R, int V, class Y, class W>
void expand_columns(Y* y, int64_t y_stride, const float* t, const W* bt, int64_t rank, int64_t columns, int64_t count) {
  Floats sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = Floats::zero();
  const bool whole = count == V * lanes;
  for (int64_t j = 0; j < rank; j++) {
    Floats w[V];
    for (int v = 0; v < V; v++) {
      const W* from = bt + j * columns + v * lanes;
      __builtin_prefetch(from + 4 * columns);
      w[v] = whole ? Floats::load(from) : Floats::load(from, count);
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sums[r][v] = fma(Floats(t[r * rank + j]), w[v], sums[r][v]);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      Y* to = y + r * y_stride + v * lanes;
      if (whole)
        (Floats::load(to) + sums[r][v]).store(to);
      else
        (Floats::load(to, count) + sums[r][v]).store(to, count);
    }
}

template <int R, class Y, class W>
void expand(Y* y, int64_t y_stride, const float* t, const W* bt, int64_t rank, int64_t columns, int64_t span) {
  // As wide as the registers allow: each rank is a stream of its own, and memory answers long pieces best.
  constexpr int V = (lanes == 16 ? 16 : 8) / R;
  int64_t n = 0;
  for (; n + V * lanes <= span; n += V * lanes)
    expand_columns<R, V>(y + n, y_stride, t, bt + n, rank, columns, V * lanes);
  for (; n < span; n += lanes) expand_columns<R, 1>(y + n, y_stride, t, bt + n, rank, columns, at_most(span - n, lanes));
}

template <class X, class W>
void shrink_task(const Call& call, int64_t i) {
  const int64_t s = find(call, &Offsets::shrink, i);
  const Segment& segment = call.segments[s];
  const int64_t block = i - call.offsets[s].shrink, blocks = segment.row_blocks();
  const int64_t row = block % blocks * kBlock, rank = block / blocks * kBlock;
  float* t = call.products + call.offsets[s].product + row * segment.rank + rank;
  const X* x = (const X*)call.x + (segment.start + row) * call.x_stride;
  const W* a = (const W*)segment.a + rank * call.inputs;
  constexpr void (*by_height[])(float*, int64_t, const X*, int64_t, const W*, int64_t, int64_t) = {
      shrink<1, X, W>, shrink<2, X, W>, shrink<3, X, W>, shrink<4, X, W>};
  by_height[at_most(segment.rows() - row, kBlock) - 1](t, segment.rank, x, call.x_stride, a,
                                                       at_most(segment.rank - rank, kBlock), call.inputs);
}

template <class Y, class W>
void expand_task(const Call& call, int64_t i) {
  const int64_t s = find(call, &Offsets::expand, i);
  const Segment& segment = call.segments[s];
  const int64_t block = i - call.offsets[s].expand, blocks = segment.row_blocks();
  const int64_t row = block % blocks * kBlock, column = block / blocks * kSpan;
  Y* y = (Y*)call.y + (segment.start + row) * call.y_stride + segment.column + column;
  const float* t = call.products + call.offsets[s].product + row * segment.rank;
  constexpr void (*by_height[])(Y*, int64_t, const float*, const W*, int64_t, int64_t, int64_t) = {
      expand<1, Y, W>, expand<2, Y, W>, expand<3, Y, W>, expand<4, Y, W>};
  by_height[at_most(segment.rows() - row, kBlock) - 1](y, call.y_stride, t, (const W*)segment.bt + column, segment.rank,
                                                       segment.columns, at_most(segment.columns - column, kSpan));
}

template <class X, class Y, class W>
void run(Call call) {
  call.offsets = (Offsets*)scratch(kCallTable, call.count * sizeof(Offsets));
  Offsets end{0, 0, 0};
  for (int64_t s = 0; s < call.count; s++) {
    const Segment& segment = call.segments[s];
    call.offsets[s] = end;
    end.shrink += segment.shrink_tasks();
    end.expand += segment.expand_tasks();
    end.product += segment.rows() * segment.rank;
  }
  call.products = (float*)scratch(kCall, end.product * sizeof(float));
  parallel_for(end.shrink, [&](int64_t i) { shrink_task<X, W>(call, i); });
  parallel_for(end.expand, [&](int64_t i) { expand_task<Y, W>(call, i); });
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
