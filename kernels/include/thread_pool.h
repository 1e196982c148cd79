// Fork and join over a few threads of our own, and the memory they work in. Implemented in runtime/, for no ISA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvrun {

using Task = void (*)(const void* context, int64_t index);

// Runs task(context, i) for every i below count, and returns when all are done. Each thread starts on a contiguous
// share and then takes what others have left. While another thread's call holds the workers, the caller runs alone:
// so ops must not let results depend on who ran what.
void run_tasks(int64_t count, Task task, const void* context);

int64_t thread_count();

// This thread's buffer number `slot`, 64-byte aligned, at least `bytes` long; it stays valid until asked for longer.
void* scratch(int slot, size_t bytes);

// Buffers that one call may hold together. A task may run on the calling thread: so the slots differ.
enum Slot { kCall = 0, kCallTable = 1, kTask = 2, kSlots = 3 };

namespace {

template <class F>
inline void parallel_for(int64_t count, const F& f) {
  run_tasks(count, [](const void* context, int64_t index) { (*static_cast<const F*>(context))(index); }, &f);
}

// Shares rows among the threads in blocks large enough to be worth a hand-over; f(begin, end).
template <class F>
inline void parallel_rows(int64_t rows, int64_t work_per_row, const F& f) {
  constexpr int64_t worth = 32768;
  int64_t block = work_per_row > 0 ? worth / work_per_row : rows;
  if (block < 1) block = 1;
  parallel_for((rows + block - 1) / block, [&](int64_t i) {
    const int64_t end = (i + 1) * block;
    f(i * block, end < rows ? end : rows);
  });
}

}  // namespace
}  // namespace kvrun
