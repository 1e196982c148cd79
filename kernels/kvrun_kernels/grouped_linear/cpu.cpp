// Groups of rows, each against a packed weight of its own.
#include "panel.h"

namespace kvrun {
namespace {

// As grouped.py lays it out.
struct Group {
  const void *panels, *bias;
};

}  // namespace
}  // namespace kvrun

KVRUN_OP(grouped_linear)
(void* out, const void* x, const void* groups, const void* bounds, int64_t count, int64_t outputs, int64_t inputs, int64_t stride,
 int64_t x_dtype, int64_t weight_dtype, int64_t bias_dtype) {
  using namespace kvrun;
  with_step(x_dtype, weight_dtype, [&](auto step, auto x_type) {
    using T = typename decltype(x_type)::type;
    multiply_groups((const int64_t*)bounds, count, kSlab, kRows, [&](int64_t g, int64_t row) {
      const Group& group = ((const Group*)groups)[g];
      const Product product{out, x, group.panels, group.bias, outputs, inputs, stride, x_dtype, bias_dtype};
      return Packed<typename decltype(step)::type, T>{product.from<T>(row)};
    });
  });
}
