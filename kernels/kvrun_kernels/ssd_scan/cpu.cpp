// Token after token, each head's state decays as one and takes the product of its input with b. A task is a vector of a
// head's rows in one sequence over all its tokens.
#include "recurrent.h"

namespace kvrun {
namespace {

struct Call {
  void* out;
  const void *x, *z;
  const float* d;
  float* state;
  Sequences sequences;
  int64_t heads, dim, groups, size, x_stride, z_stride;
  // Of every token, laid out before the tasks: [heads] steps and decays, [groups][padded] of b and c.
  float *steps, *decays, *b, *c;

  int64_t padded() const { return whole_vectors(size); }
};

// Steps and decays of one token's heads.
template <class D>
void prepare(const Call& call, int64_t t, const D* dt, const float* a, const float* dt_bias, float least, float most) {
  for (int64_t h = 0; h < call.heads; h += lanes) {
    const int64_t count = call.heads - h;
    Floats step = softplus(load_some(dt + h, count) + load_some(dt_bias + h, count));
    step = step.raw < least ? Floats(least).raw : step.raw;
    step = step.raw > most ? Floats(most).raw : step.raw;
    store_some(step, call.steps + t * call.heads + h, count);
    store_some(exp(step * load_some(a + h, count)), call.decays + t * call.heads + h, count);
  }
}

template <class X>
void scan(const Call& call, int64_t n, int64_t head, int64_t row) {
  const int64_t start = call.sequences.start(n), stop = call.sequences.stop(n);
  if (start == stop) return;
  const int64_t size = call.size, padded = call.padded(), count = at_most(call.dim - row, lanes);
  const int64_t first = head * call.dim + row, width = call.heads * call.dim, group = head / (call.heads / call.groups);
  float* kept = call.sequences.state(call.state + first * size, width * size, n);
  const States states((float*)scratch(kTask, lanes * padded * sizeof(float)), kept, call.sequences.fresh[n], count, size, padded);
  const Floats d(call.d[head]);
  for (int64_t t = start; t < stop; t++) {
    const Floats x = load_some((const X*)call.x + t * call.x_stride + first, count), decay(call.decays[t * call.heads + head]);
    float gain[lanes], y[lanes];
    (Floats(call.steps[t * call.heads + head]) * x).store(gain);
    const int64_t place = (t * call.groups + group) * padded;
    states.advance(gain, call.b + place, call.c + place, y, [&](int64_t, int64_t) { return decay; });
    Floats sum = fma(d, x, Floats::load(y));
    if (call.z) sum = sum * silu(load_some((const X*)call.z + t * call.z_stride + first, count));
    store_some(sum, (X*)call.out + t * width + first, count);
  }
  states.keep();
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(ssd_scan)
(void* out, const void* x, const void* dt, const void* z, const void* b, const void* c, const float* a, const float* d,
 const float* dt_bias, float* state, const int32_t* query_start, const int32_t* slots, const uint8_t* fresh,
 int64_t tokens, int64_t sequences, int64_t slot_count, int64_t heads, int64_t dim, int64_t groups, int64_t size,
 int64_t x_stride, int64_t dt_stride, int64_t z_stride, int64_t b_stride, int64_t c_stride, float least, float most,
 int64_t x_dtype, int64_t dt_dtype, int64_t b_dtype) {
  using namespace kvrun;
  const int64_t padded = whole_vectors(size), blocks = (dim + lanes - 1) / lanes;
  float* memory = (float*)scratch(kCall, 2 * tokens * (groups * padded + heads) * sizeof(float));
  float *into = memory, *out_of = into + tokens * groups * padded, *steps = out_of + tokens * groups * padded;
  const Call call{out,  x,      z,    d,        state,    {sequences, slot_count, query_start, slots, fresh},
                  heads, dim,   groups, size,   x_stride, z_stride, steps, steps + tokens * heads, into, out_of};
  with_dtype(b_dtype, [&](auto type) {
    using B = typename decltype(type)::type;
    parallel_rows(tokens, 2 * groups * padded, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        widen_rows(into + t * groups * padded, (const B*)b + t * b_stride, groups, size, size, padded);
        widen_rows(out_of + t * groups * padded, (const B*)c + t * c_stride, groups, size, size, padded);
      }
    });
  });
  with_dtype(dt_dtype, [&](auto type) {
    using D = typename decltype(type)::type;
    for (int64_t t = 0; t < tokens; t++) prepare(call, t, (const D*)dt + t * dt_stride, a, dt_bias, least, most);
  });
  with_dtype(x_dtype, [&](auto type) {
    using X = typename decltype(type)::type;
    const int64_t work = (sequences ? tokens / sequences + 1 : 1) * lanes * padded;
    parallel_rows(sequences * heads * blocks, work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) scan<X>(call, i / blocks / heads, i / blocks % heads, i % blocks * lanes);
    });
  });
}
