// Two passes over a row that stays in the first-level cache.
#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

template <class X, class W>
void norm_row(X* out, const X* x, const W* weight, int64_t width, float eps, float offset) {
  constexpr int w = Floats::width;
  const int64_t whole = width / w * w, rest = width - whole;
  Floats squares = Floats::zero();
  for (int64_t i = 0; i < whole; i += w) {
    const Floats v = Floats::load(x + i);
    squares = fma(v, v, squares);
  }
  if (rest) {
    const Floats v = Floats::load(x + whole, rest);
    squares = fma(v, v, squares);
  }
  const Floats scale(1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps));
  const Floats shift(offset);
  for (int64_t i = 0; i < whole; i += w)
    (Floats::load(x + i) * scale * (Floats::load(weight + i) + shift)).store(out + i);
  if (rest) (Floats::load(x + whole, rest) * scale * (Floats::load(weight + whole, rest) + shift)).store(out + whole, rest);
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(rms_norm)
(void* out, const void* x, const void* weight, int64_t rows, int64_t parts, int64_t width, int64_t stride,
 int64_t part_stride, float eps, float offset, int64_t x_dtype, int64_t weight_dtype) {
  using namespace kvrun;
  with_dtype(x_dtype, [&](auto x_type) {
    with_dtype(weight_dtype, [&](auto weight_type) {
      using X = typename decltype(x_type)::type;
      using W = typename decltype(weight_type)::type;
      parallel_rows(rows * parts, width, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
          const X* from = (const X*)x + r / parts * stride + r % parts * part_stride;
          norm_row((X*)out + r * width, from, (const W*)weight, width, eps, offset);
        }
      });
    });
  });
}
