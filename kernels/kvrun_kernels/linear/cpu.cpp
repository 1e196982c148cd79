// y = x W^T + b over a packed weight.
#include "panel.h"

namespace kvrun {
namespace {

template <class S, class T>
void run_slab(const Product& product, int64_t count) {
  const Rows rows(count, kRows);
  typename S::X* x = (typename S::X*)scratch(kCall, count * steps_of<S>(product.inputs) * S::values * sizeof(typename S::X));
  const Layout<S, T> layout{product, rows, x};
  // Waking the others costs more than a few short rows.
  if (count * layout.padded < 32768)
    for (int64_t i = 0; i < layout.count; i++) layout.piece(i);
  else
    parallel_for(layout.count, [&](int64_t i) { layout.piece(i); });

  const int64_t panels = product.panel_count(), enough = 8 * thread_count();
  const int64_t group = panels_of_a_task(rows, panels, 1), groups = (panels + group - 1) / group;
  int64_t cuts = groups < enough ? enough / groups : 1;
  if (cuts > rows.tiles) cuts = rows.tiles;
  parallel_for(groups * cuts, [&](int64_t i) {
    const int64_t first = i / cuts * group, last = first + group < panels ? first + group : panels, cut = i % cuts;
    multiply<S>(product, rows, x, first, last, rows.tiles * cut / cuts, rows.tiles * (cut + 1) / cuts);
  });
}

template <class S, class T>
void run_all(Product product, int64_t rows) {
  for (int64_t row = 0; row < rows; row += kSlab) {
    run_slab<S, T>(product, rows - row < kSlab ? rows - row : kSlab);
    product.x = (const T*)product.x + kSlab * product.stride;
    product.out = (T*)product.out + kSlab * product.outputs;
  }
}

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
  with_step(x_dtype, weight_dtype, [&](auto step, auto x_type) {
    run_all<typename decltype(step)::type, typename decltype(x_type)::type>(product, rows);
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
