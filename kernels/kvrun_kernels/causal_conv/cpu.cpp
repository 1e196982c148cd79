// Each channel's last inputs times its taps, oldest first. A task is a vector of channels in every sequence: its taps and
// its last inputs lie side by side, and the inputs move up by one from token to token.
#include "recurrent.h"

namespace kvrun {
namespace {

struct Call {
  void* out;
  const void *x, *weight, *bias;
  void* state;
  Sequences sequences;
  int64_t channels, taps, stride;
  bool silu;
};

template <class X, class W, class S>
void convolve(const Call& call, int64_t channel) {
  const int64_t taps = call.taps, past = taps - 1, count = at_most(call.channels - channel, lanes);
  Floats *weight = (Floats*)scratch(kTask, 2 * taps * sizeof(Floats)), *inputs = weight + taps;
  for (int64_t k = 0; k < taps; k++) weight[k] = load_column((const W*)call.weight + channel * taps + k, taps, count);
  const Floats bias = call.bias ? load_some((const W*)call.bias + channel, count) : Floats::zero();
  for (int64_t n = 0; n < call.sequences.count; n++) {
    const int64_t start = call.sequences.start(n), stop = call.sequences.stop(n);
    if (start == stop) continue;
    S* state = call.sequences.state((S*)call.state + channel * past, call.channels * past, n);
    const bool known = state && !call.sequences.fresh[n];
    for (int64_t k = 0; k < past; k++) inputs[k] = known ? load_column(state + k, past, count) : Floats::zero();
    for (int64_t t = start; t < stop; t++) {
      inputs[past] = load_some((const X*)call.x + t * call.stride + channel, count);
      Floats sum = Floats::zero();
      for (int64_t k = 0; k < taps; k++) sum = fma(inputs[k], weight[k], sum);
      for (int64_t k = 0; k < past; k++) inputs[k] = inputs[k + 1];
      sum = sum + bias;
      store_some(call.silu ? silu(sum) : sum, (X*)call.out + t * call.channels + channel, count);
    }
    for (int64_t k = 0; state && k < past; k++) store_column(inputs[k], state + k, past, count);
  }
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(causal_conv)
(void* out, const void* x, const void* weight, const void* bias, void* state, const int32_t* query_start,
 const int32_t* slots, const uint8_t* fresh, int64_t tokens, int64_t sequences, int64_t slot_count, int64_t channels,
 int64_t taps, int64_t stride, int64_t silu, int64_t x_dtype, int64_t weight_dtype, int64_t state_dtype) {
  using namespace kvrun;
  const Call call{out, x, weight, bias, state, {sequences, slot_count, query_start, slots, fresh}, channels, taps, stride, silu != 0};
  with_dtype(x_dtype, [&](auto x_type) {
    with_dtype(weight_dtype, [&](auto weight_type) {
      with_dtype(state_dtype, [&](auto state_type) {
        using X = typename decltype(x_type)::type;
        using W = typename decltype(weight_type)::type;
        using S = typename decltype(state_type)::type;
        parallel_rows((channels + lanes - 1) / lanes, (tokens + 2 * sequences) * taps * 8, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++) convolve<X, W, S>(call, i * lanes);
        });
      });
    });
  });
}
