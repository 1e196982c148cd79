// The workers. They spin for a moment after a job, since the next op of a model follows within microseconds, and then
// sleep on a futex: an idle server burns nothing. A job is over when its tasks are, not when every worker woke up:
// one that is late finds the gate closed and goes back to sleep.
#include "thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdlib>

namespace kvrun {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kSpinNanoseconds = 100'000;

// The gate's word: open for entering, whether the caller sleeps until the last one left, and how many are inside.
constexpr uint32_t kOpen = 1u << 31, kCallerSleeps = 1u << 30, kInside = kCallerSleeps - 1;

struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Job {
  Task task;
  const void* context;
  int threads;
};

pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
std::atomic<uint32_t> epoch{0};
// The epoch that the workers were started in: one that reads it late must still notice that it was told to stop.
uint32_t birth = 0;
std::atomic<uint32_t> gate{0};
std::atomic<uint32_t> sleepers{0};
std::atomic<bool> stopping{false};
Share shares[kMaxThreads];
Job job;
pthread_t workers[kMaxThreads];
int worker_count = 0;
std::atomic<int> wanted_threads{0};

void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

template <class Condition>
bool spin_until(const Condition& met) {
  const int64_t deadline = nanoseconds() + kSpinNanoseconds;
  do {
    for (int i = 0; i < 64; i++) {
      if (met()) return true;
      pause();
    }
  } while (nanoseconds() < deadline);
  return false;
}

void work(int self) {
  const Job mine = job;
  for (int i = 0; i < mine.threads; i++) {
    Share& share = shares[(self + i) % mine.threads];
    while (share.next.load(std::memory_order_relaxed) < share.end) {
      const int64_t index = share.next.fetch_add(1, std::memory_order_relaxed);
      if (index < share.end) mine.task(mine.context, index);
    }
  }
}

bool enter() {
  uint32_t seen = gate.load(std::memory_order_acquire);
  while (seen & kOpen)
    if (gate.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) return true;
  return false;
}

void leave() {
  const uint32_t before = gate.fetch_sub(1, std::memory_order_acq_rel);
  if ((before & kCallerSleeps) && (before & kInside) == 1) futex_wake(gate);
}

void* worker_main(void* number) {
  uint32_t seen = birth;
  for (;;) {
    if (!spin_until([&] { return epoch.load(std::memory_order_acquire) != seen; })) {
      sleepers.fetch_add(1);
      while (epoch.load() == seen) futex_wait(epoch, seen);
      sleepers.fetch_sub(1);
    }
    seen = epoch.load();
    if (stopping.load()) return nullptr;
    if (!enter()) continue;
    work(int(reinterpret_cast<intptr_t>(number)));
    leave();
  }
}

int allowed_processors(cpu_set_t& set) {
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return CPU_COUNT(&set);
}

// A worker gets a processor of its own only when the threads fill all that this process may use. With fewer, other
// processes of the same set (ranks of one model) would pin theirs to the very same ones.
void pin(pthread_t thread, int number, int threads) {
  cpu_set_t allowed, one;
  if (allowed_processors(allowed) != threads) return;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed) || number-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(thread, sizeof one, &one);
    return;
  }
}

void stop_workers() {
  stopping = true;
  epoch.fetch_add(1);
  futex_wake(epoch);
  for (int i = 1; i <= worker_count; i++) pthread_join(workers[i], nullptr);
  worker_count = 0;
  stopping = false;
}

void start_workers(int threads) {
  stop_workers();
  birth = epoch.load();
  for (int i = 1; i < threads; i++) {
    if (pthread_create(&workers[i], nullptr, worker_main, reinterpret_cast<void*>(intptr_t(i))) != 0) break;
    pin(workers[i], i, threads);
    worker_count = i;
  }
}

// A forked child has none of the workers.
void forget_workers() {
  owner = PTHREAD_MUTEX_INITIALIZER;
  gate = sleepers = 0;
  worker_count = 0;
}

[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, forget_workers);

void run_shared(int64_t count, Task task, const void* context, int threads) {
  job = {task, context, threads};
  for (int i = 0; i < threads; i++) {
    shares[i].next.store(count * i / threads, std::memory_order_relaxed);
    shares[i].end = count * (i + 1) / threads;
  }
  gate.store(kOpen, std::memory_order_release);
  epoch.fetch_add(1);
  if (sleepers.load() > 0) futex_wake(epoch);
  work(0);
  gate.fetch_and(~kOpen, std::memory_order_acq_rel);
  if (spin_until([] { return (gate.load(std::memory_order_acquire) & kInside) == 0; })) return;
  uint32_t seen = gate.fetch_or(kCallerSleeps) | kCallerSleeps;
  while (seen & kInside) {
    futex_wait(gate, seen);
    seen = gate.load(std::memory_order_acquire);
  }
}

}  // namespace

int64_t thread_count() {
  int threads = wanted_threads.load(std::memory_order_relaxed);
  if (threads > 0) return threads;
  cpu_set_t allowed;
  threads = allowed_processors(allowed);
  wanted_threads = threads < kMaxThreads ? threads : kMaxThreads;
  return wanted_threads;
}

void run_tasks(int64_t count, Task task, const void* context) {
  const int threads = int(thread_count());
  if (count < 2 || threads < 2 || pthread_mutex_trylock(&owner) != 0) {
    for (int64_t i = 0; i < count; i++) task(context, i);
    return;
  }
  if (worker_count != threads - 1) start_workers(threads);
  run_shared(count, task, context, worker_count + 1);
  pthread_mutex_unlock(&owner);
}

void* scratch(int slot, size_t bytes) {
  struct Buffers {
    void* start[kSlots] = {};
    size_t bytes[kSlots] = {};
    ~Buffers() {
      for (void* p : start) free(p);
    }
  };
  static thread_local Buffers mine;
  if (mine.bytes[slot] < bytes) {
    free(mine.start[slot]);
    // Room to grow: lengths creep up with the contexts.
    const size_t rounded = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    mine.start[slot] = aligned_alloc(4096, rounded);
    if (mine.start[slot] == nullptr) abort();
    mine.bytes[slot] = rounded;
  }
  return mine.start[slot];
}

}  // namespace kvrun

extern "C" __attribute__((visibility("default"))) void kvrun_set_num_threads(int count) {
  kvrun::wanted_threads = count < 1 ? 1 : count > kvrun::kMaxThreads ? kvrun::kMaxThreads : count;
}

extern "C" __attribute__((visibility("default"))) int kvrun_get_num_threads() { return int(kvrun::thread_count()); }
