// Token after token, each channel's state decays and takes its input. A task is a vector of channels of one sequence over
// all its tokens; a state is a row of vectors.
#include "recurrent.h"

namespace kvrun {
namespace {

struct Call {
  void* out;
  const void *x, *dt, *z, *b, *c;
  const float *a, *d, *dt_bias;
  float* state;
  Sequences sequences;
  int64_t tokens, channels, size, x_stride, dt_stride, z_stride, b_stride, c_stride;

  int64_t padded() const { return whole_vectors(size); }
};

template <class X, class D>
void scan(const Call& call, int64_t n, int64_t channel, const float* b, const float* c) {
  const int64_t start = call.sequences.start(n), stop = call.sequences.stop(n);
  if (start == stop) return;
  const int64_t size = call.size, padded = call.padded(), count = at_most(call.channels - channel, lanes);
  float *a = (float*)scratch(kTask, 2 * lanes * padded * sizeof(float)), *copy = a + lanes * padded;
  widen_rows(a, call.a + channel * size, count, size, size, padded);
  memset(a + count * padded, 0, (lanes - count) * padded * sizeof(float));
  float* kept = call.sequences.state(call.state + channel * size, call.channels * size, n);
  const States states(copy, kept, call.sequences.fresh[n], count, size, padded);
  const Floats bias = load_some(call.dt_bias + channel, count), d = load_some(call.d + channel, count);
  for (int64_t t = start; t < stop; t++) {
    const Floats x = load_some((const X*)call.x + t * call.x_stride + channel, count);
    const Floats dt = softplus(load_some((const D*)call.dt + t * call.dt_stride + channel, count) + bias);
    float step[lanes], gain[lanes], y[lanes];
    dt.store(step);
    (dt * x).store(gain);
    states.advance(gain, b + t * padded, c + t * padded, y,
                   [&](int64_t row, int64_t v) { return exp(Floats(step[row]) * Floats::load(a + row * padded + v)); });
    Floats sum = fma(d, x, Floats::load(y));
    if (call.z) sum = sum * silu(load_some((const X*)call.z + t * call.z_stride + channel, count));
    store_some(sum, (X*)call.out + t * call.channels + channel, count);
  }
  states.keep();
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(selective_scan)
(void* out, const void* x, const void* dt, const void* z, const void* b, const void* c, const float* a, const float* d,
 const float* dt_bias, float* state, const int32_t* query_start, const int32_t* slots, const uint8_t* fresh,
 int64_t tokens, int64_t sequences, int64_t slot_count, int64_t channels, int64_t size, int64_t x_stride,
 int64_t dt_stride, int64_t z_stride, int64_t b_stride, int64_t c_stride, int64_t x_dtype, int64_t dt_dtype,
 int64_t b_dtype) {
  using namespace kvrun;
  const Call call{out,      x,     dt,      z,      b,         c,        a,         d,        dt_bias,  state,
                  {sequences, slot_count, query_start, slots, fresh},
                  tokens,   channels, size, x_stride, dt_stride, z_stride, b_stride, c_stride};
  const int64_t padded = call.padded(), blocks = (channels + lanes - 1) / lanes;
  float *into = (float*)scratch(kCall, 2 * tokens * padded * sizeof(float)), *out_of = into + tokens * padded;
  with_dtype(b_dtype, [&](auto type) {
    using B = typename decltype(type)::type;
    widen_rows(into, (const B*)b, tokens, b_stride, size, padded);
    widen_rows(out_of, (const B*)c, tokens, c_stride, size, padded);
  });
  with_dtype(x_dtype, [&](auto x_type) {
    with_dtype(dt_dtype, [&](auto dt_type) {
      using X = typename decltype(x_type)::type;
      using D = typename decltype(dt_type)::type;
      const int64_t work = (sequences ? tokens / sequences + 1 : 1) * lanes * padded * 4;
      parallel_rows(sequences * blocks, work, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) scan<X, D>(call, i / blocks, i % blocks * lanes, into, out_of);
      });
    });
  });
}
