// x += scale * y over rows.
#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

template <class X, class Y>
void add_row(X* x, const Y* y, int64_t width, Floats scale) {
  int64_t i = 0;
  for (; i + Floats::width <= width; i += Floats::width) fma(Floats::load(y + i), scale, Floats::load(x + i)).store(x + i);
  if (const int64_t n = width - i; n > 0) fma(Floats::load(y + i, n), scale, Floats::load(x + i, n)).store(x + i, n);
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(add)
(void* x, const void* y, int64_t rows, int64_t width, int64_t x_stride, int64_t y_stride, float scale, int64_t x_dtype,
 int64_t y_dtype) {
  using namespace kvrun;
  with_dtype(x_dtype, [&](auto x_type) {
    with_dtype(y_dtype, [&](auto y_type) {
      using X = typename decltype(x_type)::type;
      using Y = typename decltype(y_type)::type;
      parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) add_row((X*)x + r * x_stride, (const Y*)y + r * y_stride, width, Floats(scale));
      });
    });
  });
}
