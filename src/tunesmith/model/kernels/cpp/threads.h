// A few threads that share the units of one kernel.
//
// Units are handed out one by one, and no unit depends on which thread takes it: results are the same with any
// number of threads.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tunesmith {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // `yield` does nothing on most of these cores
#endif
}

class Threads {
 public:
  // A system that refuses to start a thread gets its work done by the others.
  explicit Threads(int count) {
    try {
      for (; count_ < count; ++count_) std::thread([this, index = count_] { serve(index); }).detach();
    } catch (const std::system_error&) {
    }
  }

  int count() const { return count_; }

  // Calls work(unit, thread) for the units 0 to units - 1; returns when all have returned. `thread` is below
  // count(), and two calls at the same time have different ones. The work must not throw: it takes its memory
  // from the caller. A thread that is late finds the round closed: nobody waits for one to wake up.
  template <typename Work>
  void run(int64_t units, const Work& work) {
    if (units <= 1 || count_ == 1) {
      for (int64_t unit = 0; unit < units; ++unit) work(unit, 0);
      return;
    }
    std::lock_guard<std::mutex> one_caller(callers_);
    work_ = &work;
    call_ = [](const void* work, int64_t unit, int thread) { (*static_cast<const Work*>(work))(unit, thread); };
    units_ = units;
    next_ = 0;
    open_ = true;
    round_.fetch_add(1);
    round_.notify_all();
    take(0);
    open_ = false;
    wait_while(inside_, [](int inside) { return inside != 0; });
  }

 private:
  // A waiting thread spins about as long as a small kernel takes, then sleeps: spinning any longer would take
  // the core from the threads of the BLAS, or of another process.
  static constexpr auto kSpin = std::chrono::microseconds(50);
  static constexpr int kPauses = 64;  // between two looks at the clock

  template <typename T, typename Condition>
  static void wait_while(std::atomic<T>& value, Condition holds) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int spin = 0; spin < kPauses; ++spin) {
        if (!holds(value.load())) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < until);
    for (T seen = value.load(); holds(seen); seen = value.load()) value.wait(seen);
  }

  void take(int thread) {
    for (int64_t unit = next_.fetch_add(1); unit < units_; unit = next_.fetch_add(1)) call_(work_, unit, thread);
  }

  void serve(int thread) {
    for (uint32_t seen = 0;;) {
      wait_while(round_, [seen](uint32_t round) { return round == seen; });
      seen = round_;
      inside_.fetch_add(1);
      if (open_) take(thread);
      if (inside_.fetch_sub(1) == 1) inside_.notify_all();
    }
  }

  int count_ = 1;  // with the thread that calls
  std::mutex callers_;
  const void* work_ = nullptr;
  void (*call_)(const void* work, int64_t unit, int thread) = nullptr;
  int64_t units_ = 0;
  std::atomic<int64_t> next_{0};
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
  threads().run((size + part - 1) / part, [&](int64_t unit, int) {
    // A copy, so that no store can change the pointers that it holds: else its loops would have no vectors.
    const Work own = work;
    own(unit * part, std::min(size, (unit + 1) * part));
  });
}

// Memory for each thread of a kernel.
struct Scratch {
  float* data;
  int64_t each;

  float* of(int thread) const { return data + thread * each; }
};

// While one of these lives, each product runs on the thread that asks for it. Without it the threads of the
// BLAS and those above would compete for the same cores. The BLAS has one setting for the whole process: kernels
// of two streams take turns.
class OneThreadPerProduct {
 public:
  OneThreadPerProduct() : turn_(turns()), before_(get() ? get()() : 0) {
    if (set() && before_ > 1) set()(1);
  }
  ~OneThreadPerProduct() {
    if (set() && before_ > 1) set()(before_);
  }

 private:
  using Get = int (*)();
  using Set = void (*)(int);

  static std::mutex& turns() {
    static std::mutex mutex;
    return mutex;
  }
  static Get get() {
    static Get function = reinterpret_cast<Get>(either("openblas_get_num_threads", "MKL_Get_Max_Threads"));
    return function;
  }
  static Set set() {
    static Set function = reinterpret_cast<Set>(either("openblas_set_num_threads", "MKL_Set_Num_Threads"));
    return function;
  }
  static void* either(const char* openblas, const char* mkl) {
    void* symbol = dlsym(RTLD_DEFAULT, openblas);
    return symbol ? symbol : dlsym(RTLD_DEFAULT, mkl);
  }

  std::lock_guard<std::mutex> turn_;
  int before_;
};

}  // namespace tunesmith
