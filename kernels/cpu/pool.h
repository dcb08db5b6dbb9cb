// A few worker threads that share the items of one call, and per-thread scratch memory.
//
// Threads sleep on a condition variable when idle; after a call they look for the next one for a few tens of
// microseconds, so that the calls of one model step find them awake. Knows nothing of tensors.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return (int)workers_.size() + 1; }
  // Calls fn(ctx, i) for every i in [0, items), on the workers and the caller; returns when all are done.
  void run(long items, void (*fn)(void*, long), void* ctx);

 private:
  void work();
  void drain();

  std::vector<std::thread> workers_;
  std::mutex caller_;  // one call at a time; a second caller computes alone
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<long> generation_{0};
  std::atomic<long> next_{0};
  std::atomic<int> active_{0};    // workers that may be reading the job
  std::atomic<int> sleeping_{0};
  std::atomic<bool> open_{false};  // the job below may be joined
  std::atomic<bool> stop_{false};
  long items_ = 0;
  void (*fn_)(void*, long) = nullptr;
  void* ctx_ = nullptr;
};

template <class F>
static inline void parallel_for(Pool* pool, long items, F&& f) {
  if (pool == nullptr || items <= 1) {
    for (long i = 0; i < items; i++) f(i);
    return;
  }
  pool->run(items, [](void* ctx, long i) { (*static_cast<F*>(ctx))(i); }, &f);
}

static inline int pool_threads(const Pool* pool) { return pool ? pool->threads() : 1; }

// Memory of the calling thread, aligned to a page, kept until the thread ends; contents are undefined. Each slot
// is one buffer; asking again for the same slot may move it.
void* scratch(int slot, size_t bytes);
