#pragma once
// Thread-local memory that only grows, and the one way in which kernels use threads.

#include <omp.h>

#include <cstdlib>
#include <exception>
#include <new>

#include "cpu/vec.h"

namespace pyeff::cpu::PYEFF_ISA {
namespace {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // `count` elements, 64-byte aligned, of undefined content; valid until the next call.
  template <typename A>
  A* get(Index count) {
    constexpr std::size_t kAlign = 64;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(A);
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
      if (data_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<A*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// What one thread needs at a time; every object file that includes this has its own set.
struct ThreadScratch {
  Scratch band, panel, taps, cells;
};
inline ThreadScratch& thread_scratch() {
  static thread_local ThreadScratch scratch;
  return scratch;
}

// Calls f(thread, threads) on that many threads, or fewer if OpenMP gives fewer. An exception in
// one of them is thrown again here, after all have ended.
template <typename F>
void parallel(int threads, const F& f) {
  if (threads <= 1) {
    f(0, 1);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    try {
      f(omp_get_thread_num(), omp_get_num_threads());
    } catch (...) {
#pragma omp critical(pyeff_kernel_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// Starting threads costs about as much as this many multiply-adds.
inline int useful_threads(int threads, double multiply_adds) {
  constexpr double kWorthThreads = 2.5e6;
  return multiply_adds < kWorthThreads ? 1 : threads;
}

struct Part {
  Index begin, end;
};
inline Part part_of(Index total, int thread, int threads) {
  return {total * thread / threads, total * (thread + 1) / threads};
}

}  // namespace
}  // namespace pyeff::cpu::PYEFF_ISA
