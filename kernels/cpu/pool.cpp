#include "pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kLinger = std::chrono::microseconds(40);
constexpr int kNice = 10;  // of a thread on a spare core: behind what its owner's event loop does there
constexpr int kSpins = 2000;  // of a caller that waits for the last items: about 0.1 ms
constexpr int kLooks = 20;    // yields, until it knows who has not computed meanwhile
constexpr long kIdleNs = 2000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether the calling thread runs on that core from now on, and only there.
bool move_to(int core) {
#if defined(__linux__)
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(core, &only);
  return pthread_setaffinity_np(pthread_self(), sizeof only, &only) == 0 &&
         setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), kNice) == 0;
#else
  (void)core;
  return false;
#endif
}

struct Scratch {
  void* data[8] = {};
  size_t size[8] = {};
  ~Scratch() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

Pool::Pool(int threads, const SpareCores& spare) : borrower_(spare.borrower) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
  for (int i = 0; i < spare.count; i++) {
    const int core = spare.cores[i];
    Spare& added = spares_.emplace_back();
    added.core = spare.table + core;
    workers_.emplace_back([this, &added, core] { work_on(added, core); });
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(sleep_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

template <class Go>
void Pool::drain(Go go_on) {
  for (long i; go_on() && (i = next_.fetch_add(1)) < items_;) fn_(ctx_, i);
}

bool Pool::free(const Spare& spare) const {
  const int32_t borrower = spare.core->borrower.load();
  return spare.core->working.load() == 0 && (borrower == 0 || borrower == borrower_);
}

bool Pool::borrow(Spare& spare) {
  int32_t nobody = 0;
  return free(spare) && (spare.core->borrower.compare_exchange_strong(nobody, borrower_) || nobody == borrower_);
}

void Pool::give_back(Spare& spare) {
  int32_t me = borrower_;
  spare.core->borrower.compare_exchange_strong(me, 0);
}

void Pool::run(long items, void (*fn)(void*, long), void* ctx) {
  std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
  if (!only.owns_lock() || workers_.empty()) {
    for (long i = 0; i < items; i++) fn(ctx, i);
    return;
  }
  items_ = items, fn_ = fn, ctx_ = ctx;
  next_ = 0;
  open_ = true;
  generation_.fetch_add(1);
  bool wake = sleeping_.load() > 0;
  for (const Spare& spare : spares_) wake |= spare.asleep.load() && free(spare);
  if (wake) {
    std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }
  drain([] { return true; });
  // A worker raises active_ before it looks at open_: once this reads 0, none can still enter this job.
  open_ = false;
  for (int spins = 0; active_.load() != 0; spins++) {
    relax();
    if (spins < kSpins) continue;
    if (spins == kSpins) note_times();
    if (spins == kSpins + kLooks) fetch_pushed_aside(), spins = kSpins - 1;
    std::this_thread::yield();
  }
}

#if defined(__linux__)
static long nanoseconds(clockid_t clock) {
  timespec now;
  return clock_gettime(clock, &now) == 0 ? now.tv_sec * 1000000000L + now.tv_nsec : 0;
}

void Pool::note_times() {
  for (Spare& spare : spares_)
    if (spare.active.load()) spare.used = nanoseconds(spare.clock);
}

// Brings to the caller's cores who has not computed since `note_times`: the caller has nothing to do but to wait for
// it. Its own core may be busy for milliseconds, and an item takes a tenth of one.
void Pool::fetch_pushed_aside() {
  cpu_set_t here;
  for (Spare& spare : spares_) {
    if (!spare.active.load() || spare.fetched.load() || nanoseconds(spare.clock) - spare.used > kIdleNs) continue;
    if (pthread_getaffinity_np(pthread_self(), sizeof here, &here) != 0 ||
        pthread_setaffinity_np(spare.thread, sizeof here, &here) != 0)
      continue;
    spare.fetched = true;
    spare.core->fetched.fetch_add(1, std::memory_order_relaxed);
  }
}
#else
void Pool::note_times() {}
void Pool::fetch_pushed_aside() {}
#endif

void Pool::work() {
  long seen = 0;
  while (true) {
    auto until = Clock::now() + kLinger;
    while (generation_.load() == seen && !stop_) {
      for (int i = 0; i < 16; i++) relax();
      if (Clock::now() < until) continue;
      std::unique_lock<std::mutex> lock(sleep_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return generation_.load() != seen || stop_; });
      sleeping_.fetch_sub(1);
    }
    if (stop_) return;
    seen = generation_.load();
    active_.fetch_add(1);
    if (open_.load()) drain([] { return true; });
    active_.fetch_sub(1);
  }
}

void Pool::work_on(Spare& spare, int core) {
  if (!move_to(core)) return;  // the caller computes without it
#if defined(__linux__)
  spare.thread = pthread_self();
  if (pthread_getcpuclockid(spare.thread, &spare.clock) != 0) return;
#endif
  long seen = 0;
  while (true) {
    auto until = Clock::now() + kLinger;
    while (!(generation_.load() != seen && borrow(spare)) && !stop_) {
      for (int i = 0; i < 16; i++) relax();
      if (free(spare) && Clock::now() < until) continue;
      give_back(spare);
      std::unique_lock<std::mutex> lock(sleep_);
      spare.asleep = true;
      wake_.wait(lock, [&] { return (generation_.load() != seen && free(spare)) || stop_; });
      spare.asleep = false;
    }
    if (stop_) return give_back(spare);
    if (spare.fetched.exchange(false)) move_to(core);
    seen = generation_.load();
    spare.active = true;
    active_.fetch_add(1);
    if (open_.load()) {
      spare.core->calls.fetch_add(1, std::memory_order_relaxed);
      drain([&] { return spare.core->working.load(std::memory_order_relaxed) == 0 && !spare.fetched.load(); });
    }
    spare.active = false;
    active_.fetch_sub(1);
    if (spare.fetched.exchange(false)) move_to(core);
  }
}

void* scratch(int slot, size_t bytes) {
  thread_local Scratch mine;
  if (mine.size[slot] < bytes) {
    std::free(mine.data[slot]);
    mine.size[slot] = (bytes + 4095) / 4096 * 4096;
    mine.data[slot] = std::aligned_alloc(4096, mine.size[slot]);
    if (mine.data[slot] == nullptr) std::abort();
  }
  return mine.data[slot];
}

extern "C" {

// Asks the kernel for what this library's instructions need; 0 if it was granted.
int ss_prepare() {
#if defined(__AMX_TILE__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : 1;
#else
  return 0;
#endif
}

// `table` lies in memory that processes share, and outlives the pool; `spare` names cores of other processes.
Pool* ss_pool_create(int threads, SharedCore* table, const int32_t* spare, int count, int borrower) {
  if (threads + count < 2) return nullptr;
  return new (std::nothrow) Pool(threads, SpareCores{table, spare, count, borrower});
}

void ss_pool_destroy(Pool* pool) { delete pool; }

// From now on the process keeps freed memory for its next allocations, up to 64 MiB at the end of a heap: results of
// one layer lie where those of the last one did, and the system has no fresh pages to clear (a third of the time of
// the small operations). Blocks above 32 MiB still come and go.
void ss_keep_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
}

// Sum of a buffer's bytes as 64-bit words, read by all threads: the machine's read bandwidth.
uint64_t ss_read_memory(Pool* pool, const uint64_t* data, long words) {
  constexpr long kChunk = 1 << 17;
  std::atomic<uint64_t> total{0};
  parallel_for(pool, (words + kChunk - 1) / kChunk, [&](long i) {
    const long end = (i + 1) * kChunk < words ? (i + 1) * kChunk : words;
    uint64_t sum[16] = {};
    long w = i * kChunk;
    for (; w + 16 <= end; w += 16) {
      for (int j = 0; j < 16; j++) sum[j] += data[w + j];
    }
    for (int j = 1; j < 16; j++) sum[0] += sum[j];
    total += sum[0];
  });
  return total;
}
}
