#include "pool.h"

#if defined(__linux__)
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

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
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

Pool::Pool(int threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(sleep_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::drain() {
  for (long i; (i = next_.fetch_add(1)) < items_;) fn_(ctx_, i);
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
  if (sleeping_.load() > 0) {
    std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }
  drain();
  // A worker raises active_ before it looks at open_: once this reads 0, none can still enter this job.
  open_ = false;
  for (int spins = 0; active_.load() != 0; spins++) {
    relax();
    if (spins > 2000) std::this_thread::yield();
  }
}

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
    if (open_.load()) drain();
    active_.fetch_sub(1);
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

Pool* ss_pool_create(int threads) { return threads > 1 ? new (std::nothrow) Pool(threads) : nullptr; }

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
