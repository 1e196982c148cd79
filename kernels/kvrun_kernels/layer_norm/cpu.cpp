// Mean, then variance about it, then the affine map: three passes over a row in the first-level cache.
#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

// Applies f(vector, index, count) along a row; count is the width of a vector, or less for the last.
template <class F>
void along(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + Floats::width <= width; i += Floats::width) f(i, int64_t(Floats::width));
  if (i < width) f(i, width - i);
}

template <class T>
Floats read(const T* p, int64_t count) {
  return count == Floats::width ? Floats::load(p) : Floats::load(p, count);
}

template <class X, class W>
void norm_row(X* out, const X* x, const W* weight, const W* bias, int64_t width, float eps) {
  Floats total = Floats::zero();
  along(width, [&](int64_t i, int64_t n) { total = total + read(x + i, n); });
  const float center = sum(total) / float(width);
  const Floats mean(center);
  Floats squares = Floats::zero();
  along(width, [&](int64_t i, int64_t n) {
    Floats away = read(x + i, n) - mean;
    if (n < Floats::width) {
      // Lanes past the end hold minus the mean; they are no part of the row.
      float lanes[Floats::width] = {};
      away.store(lanes, n);
      away = Floats::load(lanes);
    }
    squares = fma(away, away, squares);
  });
  const Floats scale(1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps));
  along(width, [&](int64_t i, int64_t n) {
    Floats y = (read(x + i, n) - mean) * scale;
    if (weight) y = y * read(weight + i, n);
    if (bias) y = y + read(bias + i, n);
    n == Floats::width ? y.store(out + i) : y.store(out + i, n);
  });
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(layer_norm)
(void* out, const void* x, const void* weight, const void* bias, int64_t rows, int64_t parts, int64_t width, int64_t stride,
 int64_t part_stride, float eps, int64_t x_dtype, int64_t weight_dtype) {
  using namespace kvrun;
  with_dtype(x_dtype, [&](auto x_type) {
    with_dtype(weight_dtype, [&](auto weight_type) {
      using X = typename decltype(x_type)::type;
      using W = typename decltype(weight_type)::type;
      parallel_rows(rows * parts, width, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
          const X* from = (const X*)x + r / parts * stride + r % parts * part_stride;
          norm_row((X*)out + r * width, from, (const W*)weight, (const W*)bias, width, eps);
        }
      });
    });
  });
}
