// A few threads that share the units of one kernel.
//
// Units are handed out one by one, and no unit depends on which thread takes it: results are the same with any
// number of threads.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tunesmith {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Threads {
 public:
  explicit Threads(int count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { serve(); });
    for (auto& worker : workers_) worker.detach();
  }

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(0) to work(units - 1); returns when all have returned. The work must not throw. A thread that
  // is late finds the round closed: nobody waits for one to wake up.
  void run(int units, const std::function<void(int)>& work) {
    if (units <= 1 || workers_.empty()) {
      for (int unit = 0; unit < units; ++unit) work(unit);
      return;
    }
    std::lock_guard<std::mutex> one_caller(callers_);
    work_ = &work;
    units_ = units;
    next_ = 0;
    open_ = true;
    round_.fetch_add(1);
    round_.notify_all();
    take();
    open_ = false;
    wait_while(inside_, [](int inside) { return inside != 0; });
  }

 private:
  // A waiting thread spins about as long as a small kernel takes, then sleeps: spinning any longer would take
  // the core from the threads of the BLAS.
  static constexpr int kSpins = 2000;

  template <typename T, typename Condition>
  static void wait_while(std::atomic<T>& value, Condition holds) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (!holds(value.load())) return;
      pause();
    }
    for (T seen = value.load(); holds(seen); seen = value.load())
      value.wait(seen);
  }

  void take() {
    for (int unit = next_.fetch_add(1); unit < units_; unit = next_.fetch_add(1)) (*work_)(unit);
  }

  void serve() {
    for (uint32_t seen = 0;;) {
      wait_while(round_, [seen](uint32_t round) { return round == seen; });
      seen = round_;
      inside_.fetch_add(1);
      if (open_) take();
      if (inside_.fetch_sub(1) == 1) inside_.notify_all();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex callers_;
  const std::function<void(int)>* work_ = nullptr;
  int units_ = 0;
  std::atomic<int> next_{0};
  std::atomic<bool> open_{false};  // whether the work of this round may be taken
  std::atomic<int> inside_{0};     // threads that look whether it may
  std::atomic<uint32_t> round_{0};
};

inline int& thread_count() {
  static int count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

// The threads of this process, started at the first kernel.
inline Threads& threads() {
  static Threads* started = new Threads(thread_count());  // never destroyed: they wait until the process ends
  return *started;
}

// [0, size) in parts of at most `part`: work(begin, end).
template <typename Work>
void in_parts(int64_t size, int64_t part, const Work& work) {
  const int units = static_cast<int>((size + part - 1) / part);
  threads().run(units, [&](int unit) { work(unit * part, std::min(size, (unit + 1) * part)); });
}

// While one of these lives, each product runs on the thread that asks for it. Without it the threads of the
// BLAS and those above would compete for the same cores.
class OneThreadPerProduct {
 public:
  OneThreadPerProduct() : before_(get() ? get()() : 0) {
    if (set() && before_ > 1) set()(1);
  }
  ~OneThreadPerProduct() {
    if (set() && before_ > 1) set()(before_);
  }

 private:
  using Get = int (*)();
  using Set = void (*)(int);

  static Get get() {
    static Get found = reinterpret_cast<Get>(
        either("openblas_get_num_threads", "MKL_Get_Max_Threads"));
    return found;
  }
  static Set set() {
    static Set found = reinterpret_cast<Set>(either("openblas_set_num_threads", "MKL_Set_Num_Threads"));
    return found;
  }
  static void* either(const char* openblas, const char* mkl) {
    void* symbol = dlsym(RTLD_DEFAULT, openblas);
    return symbol ? symbol : dlsym(RTLD_DEFAULT, mkl);
  }

  int before_;
};

}  // namespace tunesmith
