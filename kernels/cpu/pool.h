// A few worker threads that share the items of one call, and per-thread scratch memory.
//
// Threads sleep on a condition variable when idle; after a call they look for the next one for a few tens of
// microseconds, so that the calls of one model step find them awake. A thread on a spare core, one that belongs to
// another process, takes items only while that process has nothing to compute, and looks before each. If others push
// it aside in the middle of an item, for which everybody waits, it ends that one on the caller's core. Knows nothing of
// tensors.
#pragma once

#if defined(__linux__)
#include <pthread.h>
#include <time.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

// One core in memory that processes share; zeros at the start.
struct alignas(64) SharedCore {
  std::atomic<int32_t> working;   // its owner computes
  std::atomic<int32_t> borrower;  // who computes on it meanwhile; 0: nobody
  std::atomic<int32_t> calls;     // that borrowers have joined
  std::atomic<int32_t> fetched;   // items of theirs that were ended on another core
};

// The cores of idle neighbours. `table` has a row for each core of the machine; `borrower` names this process.
struct SpareCores {
  SharedCore* table;
  const int32_t* cores;
  int32_t count, borrower;
};

class Pool {
 public:
  // `threads` with the caller's, and one more for each spare core.
  Pool(int threads, const SpareCores& spare);
  ~Pool();
  int threads() const { return (int)workers_.size() + 1; }
  // Calls fn(ctx, i) for every i in [0, items), on the workers and the caller; returns when all are done.
  void run(long items, void (*fn)(void*, long), void* ctx);

 private:
  struct Spare {
    SharedCore* core;
    std::atomic<bool> asleep{false};
    std::atomic<bool> active{false};  // may hold an item; `thread` and `clock` are known then
    std::atomic<bool> fetched{false};  // moved to the caller's cores: ends its item there and goes home
#if defined(__linux__)
    pthread_t thread;
    clockid_t clock;  // of its processor time
    long used = 0;    // processor time when the caller looked last, ns
#endif
  };

  void work();
  void work_on(Spare& spare, int core);
  bool free(const Spare& spare) const;
  bool borrow(Spare& spare);
  void give_back(Spare& spare);
  void note_times();
  void fetch_pushed_aside();
  template <class Go>
  void drain(Go go_on);

  int32_t borrower_;
  std::deque<Spare> spares_;
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
