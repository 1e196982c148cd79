// Makes recorded calls of ops again, one after another, without a way back to Python in between.
#include <cstddef>
#include <cstdint>
#include <utility>

namespace {

// recording.py lays these out. An op takes pointers and 64-bit integers, up to so many, and a few floats among them.
constexpr size_t kIntegers = 28;

struct Call {
  void* op;
  int64_t integers[kIntegers];
  float floats[4];
};

// In the calling conventions named below floats travel in registers of their own and the caller clears the stack. So any
// op can be called as if its integers came first, its floats last, and more of both than it takes.
template <size_t... I>
void make(const Call& call, std::index_sequence<I...>) {
  using Op = void (*)(decltype(int64_t(I))..., float, float, float, float);
  reinterpret_cast<Op>(call.op)(call.integers[I]..., call.floats[0], call.floats[1], call.floats[2], call.floats[3]);
}

}  // namespace

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
extern "C" __attribute__((visibility("default"))) void kvrun_replay(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; i++) make(calls[i], std::make_index_sequence<kIntegers>());
}
#endif
