#pragma once
// A GPU on the host, for tests: one fiber per CUDA thread, one block after the other. Fibers run
// from one meeting of threads to the next without a break, so what a kernel reads without having
// waited for it has not been written yet (or, in the other order, not been kept).

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "simt_types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else  // nobody who must know of stacks
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
inline void __asan_unpoison_memory_region(const void*, std::size_t) {}
#endif

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

constexpr int kWarp = 32, kDevices = 2;
constexpr std::size_t kStackBytes = std::size_t{256} << 10;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type
// After the shared memory, where no sanitizer looks there.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kGuardBytes = 0;
#else
constexpr std::size_t kGuardBytes = 1024;
#endif

// Where threads meet: the same call means the same line.
struct Site {
  const char *what, *file;
  int line;

  bool operator!=(const Site& other) const {
    return line != other.line || std::strcmp(what, other.what) || std::strcmp(file, other.file);
  }
  std::string words() const {
    return std::string(what) + " (" + file + ":" + std::to_string(line) + ")";
  }
};

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
  bool valid;
  int group;
};

struct Stack {
  void* pointer = nullptr;
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  void* fake = nullptr;  // of the address sanitizer
};

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  Stack stack;
  uint3 index{};
  int number = 0;  // within the block
  State state = State::kDone;
  Site site{};
  std::vector<Copy> copies;
  int groups = 0;  // committed so far
};

// Lanes of one mask on their way to one call.
struct Meeting {
  unsigned mask, arrived;
  Site site;
  void* operands[kWarp];
};

struct Launch {
  std::string name;
  dim3 grid, block;
  std::size_t shared_bytes;
  const void* stream;
  int device;
};

struct Machine {
  std::mutex one_launch;
  int device = 0, multiprocessors = 2;
  bool reverse = false;  // the order of blocks, warps and lanes
  std::vector<Launch> launches;
  std::map<void*, std::size_t> allowed_shared;
  // of the running launch
  Launch launch;
  std::function<void()> kernel;
  std::vector<Fiber> fibers;
  int threads = 0, running = 0;  // of the block; fibers that are not done
  Fiber* current = nullptr;
  std::vector<std::vector<Meeting>> meetings;  // per warp
  int at_barrier = 0;
  Site barrier{};
  char* shared = nullptr;
  Stack host;
  std::exception_ptr error;
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

[[noreturn]] inline void fail(const std::string& what) {
  const auto triple = [](uint3 v) {
    return "[" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
           "]";
  };
  throw std::runtime_error(machine().launch.name + ": " + what + "; block " + triple(blockIdx) +
                           ", thread " + triple(threadIdx));
}

// --- fibers --------------------------------------------------------------------------------------

#if !defined(__x86_64__)
#error "the emulation switches stacks on x86-64"
#endif

// Saves what a call must keep on this stack and goes on with the other one.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*other*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}

inline void go(Stack& from, Stack& to, bool for_ever = false) {
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake, to.bottom, to.bytes);
  switch_stack(&from.pointer, to.pointer);
  __sanitizer_finish_switch_fiber(from.fake, &to.bottom, &to.bytes);
}

inline void enter_fiber(Fiber& fiber) {
  machine().current = &fiber;
  threadIdx = fiber.index;
  go(machine().host, fiber.stack);
}

inline void wait_here(const Site& site) {
  Fiber& fiber = *machine().current;
  fiber.site = site;
  fiber.state = State::kWaiting;
  go(fiber.stack, machine().host);
}

inline void fiber_main() {
  Machine& m = machine();
  __sanitizer_finish_switch_fiber(nullptr, &m.host.bottom, &m.host.bytes);
  try {
    m.kernel();
    if (m.at_barrier > 0) fail("a thread ends while others wait at " + m.barrier.words());
  } catch (...) {
    if (!m.error) m.error = std::current_exception();
  }
  m.current->state = State::kDone;
  --m.running;
  go(m.current->stack, m.host, true);
  std::abort();  // nothing enters a fiber that is done
}

inline void prepare(Fiber& fiber, int number) {
  if (fiber.stack.bottom == nullptr) {
    constexpr std::size_t guard = 4096;
    void* const memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, guard, PROT_NONE);
    fiber.stack.bottom = static_cast<char*>(memory) + guard;
    fiber.stack.bytes = kStackBytes;
  }
  // The last fiber on this stack never returned from its frames: their marks are still there.
  __asan_unpoison_memory_region(fiber.stack.bottom, kStackBytes);
  // Six registers, the first call's address, and a slot that makes the alignment that of a call.
  const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(fiber.stack.bottom) + kStackBytes;
  void** const top = reinterpret_cast<void**>(end);
  std::memset(top - 8, 0, 8 * sizeof(void*));
  top[-2] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack.pointer = top - 8;
  fiber.number = number;
  const unsigned n = static_cast<unsigned>(number);
  fiber.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
  fiber.state = State::kReady;
  fiber.copies.clear();
  fiber.groups = 0;
}

// --- a block -------------------------------------------------------------------------------------

// All threads of the block meet.
inline void block_barrier(const Site& site) {
  Machine& m = machine();
  if (m.running < m.threads) fail("threads have ended before " + site.words());
  if (m.at_barrier == 0) m.barrier = site;
  if (m.barrier != site) {
    fail("barriers differ: " + m.barrier.words() + " and " + site.words());
  }
  if (++m.at_barrier < m.threads) return wait_here(site);
  m.at_barrier = 0;
  for (int t = 0; t < m.threads; ++t) m.fibers[t].state = State::kReady;
}

// The lanes of the mask meet; body(operands by lane, null without one) runs once, when the last has
// come.
template <typename Operand, typename Body>
void meet(unsigned mask, const Site& site, Operand& mine, const Body& body) {
  Machine& m = machine();
  const int lane = m.current->number % kWarp, warp = m.current->number / kWarp;
  if ((mask >> lane & 1u) == 0) fail("the mask of " + site.words() + " lacks the calling lane");
  std::vector<Meeting>& meetings = m.meetings[warp];
  std::size_t at = 0;
  while (at < meetings.size() && (meetings[at].mask & mask) == 0) ++at;
  if (at == meetings.size()) meetings.push_back({mask, 0, site, {}});
  if (meetings[at].mask != mask || meetings[at].site != site) {
    fail("lanes of a warp differ: " + meetings[at].site.words() + " and " + site.words());
  }
  meetings[at].operands[lane] = &mine;
  meetings[at].arrived |= 1u << lane;
  if (meetings[at].arrived != mask) return wait_here(site);
  Operand* operands[kWarp];
  for (int i = 0; i < kWarp; ++i) operands[i] = static_cast<Operand*>(meetings[at].operands[i]);
  meetings.erase(meetings.begin() + static_cast<std::ptrdiff_t>(at));
  body(operands);
  for (int i = 0; i < kWarp; ++i) {
    if (operands[i] != nullptr) m.fibers[warp * kWarp + i].state = State::kReady;
  }
}

[[noreturn]] inline void fail_where_all_wait() {
  const Machine& m = machine();
  std::string words = "no thread can go on:", last;
  for (int t = 0; t < m.threads; ++t) {
    const Fiber& fiber = m.fibers[t];
    const std::string does = fiber.state == State::kDone ? "ended" : "at " + fiber.site.words();
    if (does != last) words += " from thread " + std::to_string(t) + " on " + does + ",";
    last = does;
  }
  words.pop_back();
  threadIdx = {};
  fail(words);
}

inline void run_block() {
  Machine& m = machine();
  const std::size_t shared_bytes = m.launch.shared_bytes;
  m.running = m.threads;
  m.at_barrier = 0;
  m.meetings.assign((m.threads + kWarp - 1) / kWarp, {});
  std::memset(m.shared, kPoison, shared_bytes + kGuardBytes);
  for (int t = 0; t < m.threads; ++t) prepare(m.fibers[t], t);
  while (m.running > 0) {
    bool moved = false;
    for (int i = 0; i < m.threads; ++i) {
      Fiber& fiber = m.fibers[m.reverse ? m.threads - 1 - i : i];
      if (fiber.state != State::kReady) continue;
      moved = true;
      enter_fiber(fiber);
      if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
    }
    if (!moved) fail_where_all_wait();
  }
  for (std::size_t i = 0; i < kGuardBytes; ++i) {
    if (static_cast<unsigned char>(m.shared[shared_bytes + i]) != kPoison) {
      fail("written beyond the shared memory of " + std::to_string(shared_bytes) + " bytes");
    }
  }
}

inline void run_grid(const Launch& launch, std::function<void()> kernel) {
  Machine& m = machine();
  m.launch = launch;
  m.kernel = std::move(kernel);
  gridDim = launch.grid;
  blockDim = launch.block;
  m.threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  if (m.fibers.size() < static_cast<std::size_t>(m.threads)) m.fibers.resize(m.threads);
  const std::unique_ptr<char[]> shared(new char[launch.shared_bytes + kGuardBytes]);
  m.shared = shared.get();
  const std::uint64_t blocks = std::uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  for (std::uint64_t i = 0; i < blocks; ++i) {
    const std::uint64_t b = m.reverse ? blocks - 1 - i : i, row = b / gridDim.x;
    blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(row % gridDim.y),
                static_cast<unsigned>(row / gridDim.y)};
    run_block();
  }
}

// --- shared memory and copies into it ------------------------------------------------------------

inline void require_shared(const void* address, std::size_t bytes, const char* what) {
  const Machine& m = machine();
  const char* const p = static_cast<const char*>(address);
  if (p < m.shared || p + bytes > m.shared + m.launch.shared_bytes) {
    fail(std::string(what) + ": the address is outside of the shared memory");
  }
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) {
    fail(std::string(what) + ": the shared address must be a multiple of " + std::to_string(bytes));
  }
}

inline void copy_later(void* to, const void* from, std::size_t bytes, bool valid) {
  require_shared(to, bytes, "cp_async");
  if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
    fail("cp_async: the global address must be a multiple of " + std::to_string(bytes));
  }
  Fiber& fiber = *machine().current;
  std::memset(to, kPoison, bytes);
  fiber.copies.push_back({to, from, bytes, valid, fiber.groups});
}

inline void wait_for_copies(int pending) {
  Fiber& fiber = *machine().current;
  auto copy = fiber.copies.begin();
  for (; copy != fiber.copies.end() && copy->group < fiber.groups - pending; ++copy) {
    if (copy->valid) std::memcpy(copy->to, copy->from, copy->bytes);
    if (!copy->valid) std::memset(copy->to, 0, copy->bytes);
  }
  fiber.copies.erase(fiber.copies.begin(), copy);
}

}  // namespace simt
