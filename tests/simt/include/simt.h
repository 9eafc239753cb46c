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
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "simt_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

constexpr int kWarp = 32;
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
  const char* what;
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(what, other.what) == 0 &&
           std::strcmp(file, other.file) == 0;
  }
  std::string words() const {
    return std::string(what) + " (" + file + ":" + std::to_string(line) + ")";
  }
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  int group;
};

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // of the address sanitizer
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

struct LaunchRecord {
  std::string name;
  dim3 grid, block;
  std::size_t shared_bytes;
  const void* stream;
  int device;
};

struct Machine {
  std::mutex one_launch;
  int device = 0, device_count = 2, multiprocessors = 2;
  bool reverse = false;  // the order of blocks, warps and lanes
  std::vector<LaunchRecord> launches;
  std::map<const void*, int> allowed_shared;
  // of the running launch
  std::string kernel_name;
  std::function<void()> kernel;
  std::vector<Fiber> fibers;
  int threads = 0, running = 0;  // of the block; fibers that are not done
  Fiber* current = nullptr;
  std::vector<std::vector<Meeting>> meetings;  // per warp
  int at_barrier = 0;
  Site barrier{};
  char* shared = nullptr;
  std::size_t shared_bytes = 0;
  void* host_stack = nullptr;
  void* host_fake_stack = nullptr;
  const void* host_bottom = nullptr;
  std::size_t host_bytes = 0;
  std::exception_ptr error;
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
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

inline void enter_fiber(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.host_fake_stack, fiber.stack, kStackBytes);
#endif
  switch_stack(&m.host_stack, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.host_fake_stack, nullptr, nullptr);
#endif
}

inline void leave_fiber() {
  Machine& m = machine();
  Fiber& fiber = *m.current;
#if defined(__SANITIZE_ADDRESS__)
  const bool last = fiber.state == State::kDone;
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, m.host_bottom, m.host_bytes);
#endif
  switch_stack(&fiber.stack_pointer, m.host_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &m.host_bottom, &m.host_bytes);
#endif
}

[[noreturn]] inline void fail(const std::string& what) {
  const auto triple = [](auto v) {
    return "[" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
           "]";
  };
  throw std::runtime_error(machine().kernel_name + ": " + what + "; block " + triple(blockIdx) +
                           ", thread " + triple(threadIdx));
}

inline void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.host_bottom, &m.host_bytes);
#endif
  Fiber& fiber = *m.current;
  try {
    m.kernel();
    if (m.at_barrier > 0) fail("a thread ends while others wait at " + m.barrier.words());
  } catch (...) {
    if (!m.error) m.error = std::current_exception();
  }
  fiber.state = State::kDone;
  --m.running;
  leave_fiber();
  std::abort();  // nothing enters a fiber that is done
}

inline void prepare(Fiber& fiber, int number) {
  if (fiber.stack == nullptr) {
    constexpr std::size_t guard = 4096;
    void* const memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, guard, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + guard;
  }
#if defined(__SANITIZE_ADDRESS__)
  // The last fiber on this stack never returned from its frames: their marks are still there.
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  // Six registers, the first call's address, and a slot that makes the alignment that of a call.
  void** const top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  std::memset(top - 8, 0, 8 * sizeof(void*));
  top[-2] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 8;
  fiber.number = number;
  const unsigned n = static_cast<unsigned>(number);
  fiber.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
  fiber.state = State::kReady;
  fiber.copies.clear();
  fiber.groups = 0;
}

// --- a block -------------------------------------------------------------------------------------

inline std::string whom_all_wait_for() {
  Machine& m = machine();
  std::string words = "no thread can go on:";
  std::vector<std::pair<std::string, int>> places;
  for (int t = 0; t < m.threads; ++t) {
    const Fiber& fiber = m.fibers[t];
    const std::string place =
        fiber.state == State::kDone ? "have ended" : "wait at " + fiber.site.words();
    if (places.empty() || places.back().first != place) places.emplace_back(place, t);
  }
  for (std::size_t i = 0; i < places.size() && i < 6; ++i) {
    words += " from thread " + std::to_string(places[i].second) + " on they " + places[i].first +
             (i + 1 < places.size() ? "," : "");
  }
  return words;
}

inline void run_block() {
  Machine& m = machine();
  m.running = m.threads;
  m.at_barrier = 0;
  m.meetings.assign((m.threads + kWarp - 1) / kWarp, {});
  if (m.shared != nullptr) std::memset(m.shared, kPoison, m.shared_bytes + kGuardBytes);
  for (int t = 0; t < m.threads; ++t) prepare(m.fibers[t], t);
  while (m.running > 0) {
    bool moved = false;
    for (int i = 0; i < m.threads; ++i) {
      Fiber& fiber = m.fibers[m.reverse ? m.threads - 1 - i : i];
      if (fiber.state != State::kReady) continue;
      moved = true;
      enter_fiber(fiber);
      if (m.error) return;
    }
    if (!moved) {
      threadIdx = {};
      fail(whom_all_wait_for());
    }
  }
  for (std::size_t i = 0; m.shared != nullptr && i < kGuardBytes; ++i) {
    if (static_cast<unsigned char>(m.shared[m.shared_bytes + i]) != kPoison) {
      fail("written beyond the shared memory of " + std::to_string(m.shared_bytes) + " bytes");
    }
  }
}

inline void wait_here(const Site& site) {
  Fiber& fiber = *machine().current;
  fiber.site = site;
  fiber.state = State::kWaiting;
  leave_fiber();
}

// All threads of the block meet.
inline void block_barrier(const Site& site) {
  Machine& m = machine();
  if (m.running < m.threads) fail("threads have ended before " + site.words());
  if (m.at_barrier == 0) {
    m.barrier = site;
  } else if (!(m.barrier == site)) {
    fail("barriers differ: " + m.barrier.words() + " and " + site.words());
  }
  if (++m.at_barrier < m.threads) return wait_here(site);
  m.at_barrier = 0;
  for (int t = 0; t < m.threads; ++t) m.fibers[t].state = State::kReady;
}

// The lanes of the mask meet; body(operands by lane) runs once, when the last has come.
template <typename Operand, typename Body>
void meet(unsigned mask, const Site& site, Operand& mine, const Body& body) {
  Machine& m = machine();
  const int lane = m.current->number % kWarp, warp = m.current->number / kWarp;
  if ((mask >> lane & 1u) == 0) fail("the mask of " + site.words() + " lacks the calling lane");
  std::vector<Meeting>& meetings = m.meetings[warp];
  std::size_t at = 0;
  while (at < meetings.size() && meetings[at].mask != mask) ++at;
  if (at == meetings.size()) {
    for (const Meeting& other : meetings) {
      if (other.mask & mask) {
        fail("lanes with other masks wait at " + other.site.words() + ": " + site.words());
      }
    }
    meetings.push_back({mask, 0, site, {}});
  } else if (!(meetings[at].site == site)) {
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
    if (mask >> i & 1u) m.fibers[warp * kWarp + i].state = State::kReady;
  }
}

// --- shared memory and copies into it ------------------------------------------------------------

inline void require_shared(const void* address, int bytes, const char* what) {
  const Machine& m = machine();
  const char* const p = static_cast<const char*>(address);
  if (p < m.shared || p + bytes > m.shared + m.shared_bytes) {
    fail(std::string(what) + ": the address is outside of the shared memory");
  }
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) {
    fail(std::string(what) + ": the shared address must be a multiple of " + std::to_string(bytes));
  }
}

inline void copy_later(void* to, const void* from, int bytes, bool valid) {
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
  std::size_t done = 0;
  for (; done < fiber.copies.size(); ++done) {
    const Copy& copy = fiber.copies[done];
    if (copy.group >= fiber.groups - pending) break;
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  fiber.copies.erase(fiber.copies.begin(),
                     fiber.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

// --- a launch ------------------------------------------------------------------------------------

inline void run_grid() {
  Machine& m = machine();
  if (m.fibers.size() < static_cast<std::size_t>(m.threads)) m.fibers.resize(m.threads);
  if (m.shared_bytes > 0) m.shared = static_cast<char*>(std::malloc(m.shared_bytes + kGuardBytes));
  const std::uint64_t blocks = std::uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  try {
    for (std::uint64_t i = 0; i < blocks && !m.error; ++i) {
      const std::uint64_t b = m.reverse ? blocks - 1 - i : i;
      blockIdx = {static_cast<unsigned>(b % gridDim.x),
                  static_cast<unsigned>(b / gridDim.x % gridDim.y),
                  static_cast<unsigned>(b / gridDim.x / gridDim.y)};
      run_block();
    }
  } catch (...) {
    m.error = std::current_exception();
  }
  std::free(m.shared);
  m.shared = nullptr;
  m.kernel = nullptr;
  if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
}

inline bool is_possible(dim3 grid, dim3 block, std::size_t shared_bytes, int allowed) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  return threads >= 1 && threads <= 1024 && block.z <= 64 && grid.x >= 1 && grid.y >= 1 &&
         grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
         shared_bytes <= static_cast<std::size_t>(allowed);
}

}  // namespace simt
