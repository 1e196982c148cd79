// An activation of every element, times its neighbour half where gated.
#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

template <int act>
Floats apply(Floats x) {
  if constexpr (act == 0) return x * sigmoid(x);
  if constexpr (act == 1) return Floats(0.5f) * x * (Floats(1.0f) + erf(x * Floats(0.70710678f)));
  if constexpr (act == 2) {
    const Floats inner = Floats(0.79788456f) * fma(Floats(0.044715f) * x, x * x, x);
    return Floats(0.5f) * x * (Floats(1.0f) + tanh(inner));
  }
  // Comparing this way round lets a NaN through.
  if constexpr (act == 3) return x.raw < 0.0f ? Floats::Raw{} : x.raw;
  if constexpr (act == 4) return x * sigmoid(Floats(1.702f) * x);
}

template <int act, class T>
void act_row(T* out, const T* x, const T* up, int64_t width) {
  int64_t i = 0;
  for (; i + Floats::width <= width; i += Floats::width) {
    Floats y = apply<act>(Floats::load(x + i));
    if (up) y = y * Floats::load(up + i);
    y.store(out + i);
  }
  if (const int64_t n = width - i; n > 0) {
    Floats y = apply<act>(Floats::load(x + i, n));
    if (up) y = y * Floats::load(up + i, n);
    y.store(out + i, n);
  }
}

template <class T>
using Row = void (*)(T*, const T*, const T*, int64_t);

template <class T>
Row<T> row_of(int64_t act) {
  constexpr Row<T> rows[] = {act_row<0, T>, act_row<1, T>, act_row<2, T>, act_row<3, T>, act_row<4, T>};
  return rows[act];
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(act_mul)
(void* out, const void* x, int64_t rows, int64_t width, int64_t stride, int64_t act, int64_t gated, int64_t dtype) {
  using namespace kvrun;
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Row<T> run = row_of<T>(act);
    // Counted as eight plain operations an element. Blocks of a row keep all threads busy with one token.
    constexpr int64_t span = 4096;
    const int64_t spans = (width + span - 1) / span;
    parallel_rows(rows * spans, 8 * (width < span ? width : span), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / spans, at = i % spans * span, count = width - at < span ? width - at : span;
        const T* from = (const T*)x + row * stride + at;
        run((T*)out + row * width + at, from, gated ? from + width : nullptr, count);
      }
    });
  });
}
