// y = x W^T + b over a packed weight.
#include "panel.h"

namespace kvrun {
namespace {

template <class W>
void pack(W* panels, const W* weight, int64_t outputs, int64_t inputs, int64_t stride) {
  constexpr int pair = Widened<W>::inputs;
  const int64_t steps = (inputs + pair - 1) / pair, count = (outputs + kPanel - 1) / kPanel;
  parallel_for(count, [&](int64_t p) {
    W* to = panels + p * kPanel * steps * pair;
    for (int64_t k = 0; k < steps * pair; k += pair)
      for (int64_t n = p * kPanel; n < (p + 1) * kPanel; n++)
        for (int64_t i = 0; i < pair; i++) *to++ = n < outputs && k + i < inputs ? weight[n * stride + k + i] : W{};
  });
}

}  // namespace
}  // namespace kvrun

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

KVRUN_OP(pack_linear)
(void* panels, const void* weight, int64_t outputs, int64_t inputs, int64_t stride, int64_t dtype) {
  using namespace kvrun;
  with_dtype(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    pack((W*)panels, (const W*)weight, outputs, inputs, stride);
  });
}
