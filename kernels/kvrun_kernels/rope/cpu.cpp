// Rotates pairs of every head in place. Style 0 pairs i with i + pairs, style 1 pairs 2i with 2i + 1.
#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

template <class T>
float get(const T* p) {
  return Floats::load(p, 1).first();
}

template <class T>
void rotate_halves(T* head, const float* cos, const float* sin, int64_t pairs) {
  int64_t i = 0;
  for (; i + Floats::width <= pairs; i += Floats::width) {
    const Floats a = Floats::load(head + i), b = Floats::load(head + pairs + i);
    const Floats c = Floats::load(cos + i), s = Floats::load(sin + i);
    (a * c - b * s).store(head + i);
    (b * c + a * s).store(head + pairs + i);
  }
  if (const int64_t n = pairs - i; n > 0) {
    const Floats a = Floats::load(head + i, n), b = Floats::load(head + pairs + i, n);
    const Floats c = Floats::load(cos + i, n), s = Floats::load(sin + i, n);
    (a * c - b * s).store(head + i, n);
    (b * c + a * s).store(head + pairs + i, n);
  }
}

template <class T>
void rotate_neighbours(T* head, const float* cos, const float* sin, int64_t pairs) {
  constexpr int w = Floats::width;
  float a[w], b[w];
  for (int64_t i = 0; i < pairs; i += w) {
    const int64_t n = pairs - i < w ? pairs - i : w;
    T* at = head + 2 * i;
    float both[2 * w] = {};
    Floats::load(at, 2 * n < w ? 2 * n : w).store(both);
    if (2 * n > w) Floats::load(at + w, 2 * n - w).store(both + w);
    for (int j = 0; j < w; j++) a[j] = both[2 * j], b[j] = both[2 * j + 1];
    const Floats va = Floats::load(a), vb = Floats::load(b);
    const Floats c = Floats::load(cos + i, n), s = Floats::load(sin + i, n);
    (va * c - vb * s).store(a);
    (vb * c + va * s).store(b);
    for (int j = 0; j < w; j++) both[2 * j] = a[j], both[2 * j + 1] = b[j];
    Floats::load(both).store(at, 2 * n < w ? 2 * n : w);
    if (2 * n > w) Floats::load(both + w).store(at + w, 2 * n - w);
  }
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(rope)
(void* heads, const void* positions, const void* cos, const void* sin, int64_t tokens, int64_t count, int64_t pairs,
 int64_t token_stride, int64_t head_stride, int64_t table_rows, int64_t style, int64_t dtype, int64_t) {
  using namespace kvrun;
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_rows(tokens, count * pairs * 2, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const int64_t position = ((const int32_t*)positions)[t];
        if (position < 0 || position >= table_rows) continue;
        const float *c = (const float*)cos + position * pairs, *s = (const float*)sin + position * pairs;
        for (int64_t h = 0; h < count; h++) {
          T* head = (T*)heads + t * token_stride + h * head_stride;
          style == 0 ? rotate_halves(head, c, s, pairs) : rotate_neighbours(head, c, s, pairs);
        }
      }
    });
  });
}
