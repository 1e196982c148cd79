// y = x W^T + b over a packed weight.
#include "panel.h"

KVRUN_OP(linear)
(void* out, const void* x, const void* panels, const void* bias, int64_t rows, int64_t outputs, int64_t inputs,
 int64_t stride, int64_t x_dtype, int64_t weight_dtype, int64_t bias_dtype) {
  using namespace kvrun;
  const Product product{out, x, panels, bias, outputs, inputs, stride, x_dtype, bias_dtype};
  const int64_t bounds[] = {0, rows};
  with_step(x_dtype, weight_dtype, [&](auto step, auto x_type) {
    using T = typename decltype(x_type)::type;
    multiply_groups(bounds, 1, kSlab, kRows, [&](int64_t, int64_t row) {
      return Packed<typename decltype(step)::type, T>{product.from<T>(row)};
    });
  });
}
