#include "emu/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cora::emu {

ThreadState* current = nullptr;
Dim3 grid_dim, block_dim;
int device_major = 8, multiprocessors = 6;

namespace {

constexpr int kLanes = 32;
constexpr size_t kSharedAlign = 1024;
constexpr size_t kStackBytes = 128 * 1024;

// --- Fibers -----------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers on the running stack, its top in *from, and continues on `to`. ucontext would
// do, but makes two system calls a switch.
asm(R"(
.pushsection .text
.type cora_emu_switch, @function
cora_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cora_emu_switch, .-cora_emu_switch
.popsection
)");
extern "C" void cora_emu_switch(void** from, void* to);

struct Context {
  void* top = nullptr;
  void start(char* stack, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(stack + kStackBytes);
    *--sp = nullptr;  // keeps the stack as a call leaves it: 16-byte aligned plus a return address
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    top = sp;
  }
  void go(Context& to) { cora_emu_switch(&top, to.top); }
};
#else
struct Context {
  ucontext_t context{};
  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void go(Context& to) { swapcontext(&context, &to.context); }
};
#endif

// --- State ------------------------------------------------------------------------------------------

using Site = std::pair<std::string, int>;

struct Copy {
  char* to;
  const char* from;
  bool valid;
};

struct Fiber : ThreadState {
  Context context;
  bool done = false;
  const char* waiting = "";  // for the deadlock report
  int line = 0;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // not yet committed
};

struct Warp {
  std::vector<int> ready;  // threads that can run
  const void* identity = nullptr;
  void* operands[kLanes];
  int arrived = 0;
  // Its parts of warpgroup instructions, oldest group first; an empty function: done early. The last group is open.
  std::vector<std::vector<std::function<void()>>> under_way{1};
  int issued = 0;  // ... since the block began
};

/// A block under way.
struct Resident {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> at_barrier;
  std::vector<int> warp_order;
  std::vector<char> shared;
  char* stacks = nullptr;
  int live = 0;
};

/// Blocks that run side by side: what one writes to global memory, another may read half done.
constexpr size_t kResident = 2;

struct State {
  std::mutex mutex;
  Resident residents[kResident];
  Resident* block = nullptr;  // of the running thread
  Context scheduler;
  size_t stack_count = 0;
  size_t told = kResident;  // the resident whose thread has just made an atomic operation
  int running = 0;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  bool failed = false;
  std::mt19937 random{0};
  unsigned seed = 0;
  std::vector<std::pair<const char*, size_t>> buffers;
  std::map<Site, int> sites[5];
  Mutation mutation = Mutation::kNone;
  int mutated_site = -1;
} state;

/// The number of a place in the source, counted in the order of first use; true if it is the mutated one.
bool mutated(Mutation kind, const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  auto& known = state.sites[static_cast<int>(kind)];
  const int site = known.emplace(Site{slash ? slash + 1 : file, line}, static_cast<int>(known.size())).first->second;
  return state.mutation == kind && state.mutated_site == site;
}

Fiber& self() { return state.block->fibers[static_cast<size_t>(state.running)]; }

void wait(const char* what, int line) {
  self().waiting = what;
  self().line = line;
  self().context.go(state.scheduler);
}

void make_ready(int thread) { state.block->warps[static_cast<size_t>(thread / kLanes)].ready.push_back(thread); }

void fiber_main() {
  (*state.kernel)();
  Fiber& f = self();
  if (!f.open.empty() || !f.groups.empty()) fail("a thread ends with cp.async copies it never waited for");
  const auto& warps = state.block->warps;
  const size_t warp = static_cast<size_t>(state.running / kLanes);
  if (warps[warp].under_way.size() > 1 || !warps[warp].under_way[0].empty())
    fail("a warp ends with warpgroup instructions it never waited for");
  if (state.block->live == 1)
    for (size_t w = 0; w < warps.size(); ++w)
      if (warps[w].issued != warps[w / 4 * 4].issued) fail("warps of a warpgroup issued different instructions");
  f.done = true;
  --state.block->live;
  f.context.go(state.scheduler);
}

/// Odd seeds let one warp run as far as it can before the next (order drawn); even ones draw the warp each time.
int next_thread(Resident& block) {
  const int count = static_cast<int>(block.warps.size());
  Warp* chosen = nullptr;
  if (state.seed % 2 == 1) {
    for (int w : block.warp_order)
      if (chosen == nullptr && !block.warps[static_cast<size_t>(w)].ready.empty())
        chosen = &block.warps[static_cast<size_t>(w)];
  } else {
    for (int i = 0, start = static_cast<int>(state.random() % count); i < count && chosen == nullptr; ++i)
      if (!block.warps[static_cast<size_t>((start + i) % count)].ready.empty())
        chosen = &block.warps[static_cast<size_t>((start + i) % count)];
  }
  if (chosen == nullptr) return -1;
  std::swap(chosen->ready[state.random() % chosen->ready.size()], chosen->ready.back());
  const int thread = chosen->ready.back();
  chosen->ready.pop_back();
  return thread;
}

void report_deadlock(const Resident& block) {
  std::string text = "deadlock: ";
  int told = 0;
  for (size_t i = 0; i < block.fibers.size() && told < 4; ++i)
    if (!block.fibers[i].done) {
      text += "thread " + std::to_string(i) + " waits at " + block.fibers[i].waiting + " (line " +
              std::to_string(block.fibers[i].line) + "); ";
      ++told;
    }
  state.error = text + std::to_string(block.live) + " threads wait in all";
  state.failed = true;
}

void start_block(Resident& block, Dim3 index, Dim3 size) {
  const int threads = static_cast<int>(size.x * size.y * size.z);
  std::fill(block.shared.begin(), block.shared.end(), static_cast<char>(0xff));
  block.fibers.assign(static_cast<size_t>(threads), Fiber{});
  block.warps.assign(static_cast<size_t>((threads + kLanes - 1) / kLanes), Warp{});
  block.warp_order.resize(block.warps.size());
  for (size_t i = 0; i < block.warps.size(); ++i) block.warp_order[i] = static_cast<int>(i);
  std::shuffle(block.warp_order.begin(), block.warp_order.end(), state.random);
  block.at_barrier.clear();
  block.live = threads;
  state.block = &block;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[static_cast<size_t>(i)];
    const auto u = static_cast<unsigned>(i);
    f.thread = {u % size.x, u / size.x % size.y, u / (size.x * size.y)};
    f.block = index;
    f.context.start(block.stacks + static_cast<size_t>(i) * kStackBytes, fiber_main);
    make_ready(i);
  }
}

/// Lets one thread of the block run to its next barrier or collective.
void step(Resident& block) {
  const int thread = next_thread(block);
  if (thread < 0) return report_deadlock(block);
  state.block = &block;
  state.running = thread;
  Fiber& fiber = block.fibers[static_cast<size_t>(thread)];
  current = &fiber;
  state.scheduler.go(fiber.context);
}

bool refuse(const char* why) {
  state.error = why;
  state.failed = true;
  return false;
}

bool make_stacks(size_t threads) {
  if (state.stack_count >= threads) return true;
  for (Resident& block : state.residents) {
    if (block.stacks != nullptr) munmap(block.stacks, state.stack_count * kStackBytes);
    void* memory = mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    block.stacks = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
    if (block.stacks == nullptr) return false;
  }
  state.stack_count = threads;
  return true;
}

}  // namespace

void fail(const char* message) {
  state.error = std::string(message) + " (block " + std::to_string(current->block.x) + "," +
                std::to_string(current->block.y) + "," + std::to_string(current->block.z) + ", thread " +
                std::to_string(state.running) + ")";
  state.failed = true;
  self().context.go(state.scheduler);
  __builtin_unreachable();
}

bool launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.failed = false;
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  const size_t most_shared = (device_major == 9 ? 227 : 99) * 1024;
  if (threads == 0 || threads > 1024 || threads % kLanes != 0 || shared_bytes > most_shared || grid.x == 0 ||
      grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return refuse("the launch is beyond the limits of the emulated GPU");
  if (!make_stacks(threads)) return refuse("no memory for the stacks");
  state.kernel = &kernel;
  state.random.seed(state.seed);
  grid_dim = grid;
  block_dim = block;
  for (Resident& resident : state.residents) {
    resident.shared.resize(shared_bytes + kSharedAlign);
    resident.live = 0;
  }
  state.told = kResident;
  // Blocks come in any order: whole-grid assumptions break here.
  std::vector<uint64_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), state.random);
  size_t next = 0;
  while (!state.failed) {
    bool any = false;
    for (Resident& resident : state.residents) {
      if (resident.live == 0 && next < order.size()) {
        const uint64_t i = order[next++];
        start_block(resident,
                    {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                     static_cast<unsigned>(i / grid.x / grid.y)},
                    block);
      }
      any = any || resident.live > 0;
    }
    if (!any) return true;
    // From hand in hand to one long before the other; a block that has just told others something falls behind.
    const size_t index = state.told < kResident ? kResident - 1 - state.told : state.random() % kResident;
    const int steps = state.told < kResident ? 1 << 16 : 1 << state.random() % 12;
    state.told = kResident;
    Resident& chosen = state.residents[index];
    for (int i = 0; i < steps && chosen.live > 0 && !state.failed && state.told == kResident; ++i) step(chosen);
  }
  return false;
}

const char* error() { return state.failed ? state.error.c_str() : nullptr; }

char* shared_memory() {
  const auto at = reinterpret_cast<uintptr_t>(state.block->shared.data());
  return reinterpret_cast<char*>((at + kSharedAlign - 1) & ~uintptr_t{kSharedAlign - 1});
}

void block_barrier(const char* file, int line) {
  if (mutated(Mutation::kSkipBarrier, file, line)) return;
  Resident& block = *state.block;
  block.at_barrier.push_back(state.running);
  if (block.at_barrier.size() == block.fibers.size()) {
    for (int thread : block.at_barrier) make_ready(thread);
    block.at_barrier.clear();
  }
  wait("__syncthreads", line);
}

void warp_collective(const void* identity, void* operands, void (*work)(void* const* lanes)) {
  Warp& warp = state.block->warps[static_cast<size_t>(state.running / kLanes)];
  const int lane = state.running % kLanes;
  if (warp.arrived > 0 && warp.identity != identity) fail("lanes of a warp meet at different collectives");
  warp.identity = identity;
  warp.operands[lane] = operands;
  if (++warp.arrived < kLanes) return wait("a warp collective", 0);
  work(warp.operands);
  warp.arrived = 0;
  const int first = state.running - lane;
  for (int i = 0; i < kLanes; ++i) make_ready(first + i);
  wait("a warp collective", 0);
}

void atomic_done() {
  if (state.random() % 2 == 0) return;
  state.told = static_cast<size_t>(state.block - state.residents);
  make_ready(state.running);
  wait("an atomic", 0);
}

void async_copy(void* shared, const void* global, bool valid, const char* file, int line) {
  if (!valid && mutated(Mutation::kDropPredicate, file, line)) valid = true;
  const char* base = shared_memory();
  if (static_cast<char*>(shared) < base ||
      static_cast<char*>(shared) + 16 > base + (state.block->shared.size() - kSharedAlign))
    fail("cp.async outside shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    fail("cp.async of 16 bytes is not aligned");
  if (valid) check_global(global, 16, "cp.async");
  std::memset(shared, 0xff, 16);
  self().open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), valid});
}

void async_commit() {
  Fiber& f = self();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void async_wait(int groups_left, const char* file, int line) {
  if (mutated(Mutation::kSkipWait, file, line)) groups_left = 1 << 20;
  if (mutated(Mutation::kLateWait, file, line)) ++groups_left;
  Fiber& f = self();
  while (static_cast<int>(f.groups.size()) > groups_left) {
    for (const Copy& c : f.groups.front()) {
      if (c.valid)
        std::memcpy(c.to, c.from, 16);
      else
        std::memset(c.to, 0, 16);
    }
    f.groups.erase(f.groups.begin());
  }
}

void warpgroup_issue(std::function<void()> work) {
  Warp& warp = state.block->warps[static_cast<size_t>(state.running / kLanes)];
  ++warp.issued;
  if (state.random() % 2 == 0) {
    work();
    work = nullptr;
  }
  warp.under_way.back().push_back(std::move(work));
}

void warpgroup_commit() {
  static const char identity = 0;
  warp_collective(&identity, nullptr, [](void* const*) {
    state.block->warps[static_cast<size_t>(state.running / kLanes)].under_way.emplace_back();
  });
}

void warpgroup_wait(int groups_left, const char* file, int line) {
  if (mutated(Mutation::kSkipWait, file, line)) groups_left = 1 << 20;
  if (mutated(Mutation::kLateWait, file, line)) ++groups_left;
  // By the last lane to come: what any lane did to its registers before is seen.
  static const char identity = 0;
  warp_collective(&identity, &groups_left, [](void* const* lanes) {
    auto& work = state.block->warps[static_cast<size_t>(state.running / kLanes)].under_way;
    while (static_cast<int>(work.size()) - 1 > *static_cast<const int*>(lanes[0])) {
      for (const auto& instruction : work.front())
        if (instruction) instruction();
      work.erase(work.begin());
    }
  });
}

void allocated(void* p, size_t bytes) {
  // 0x7f81 .. 0x7fff with either sign is a NaN in 16 bits of either kind, and two of them in 32.
  static unsigned count = 0;
  const uint8_t pattern[2] = {static_cast<uint8_t>(0x81 + count % 127), static_cast<uint8_t>(count % 2 ? 0x7f : 0xff)};
  ++count;
  for (size_t i = 0; i < bytes; ++i) static_cast<uint8_t*>(p)[i] = pattern[i % 2];
  if (!state.buffers.empty()) state.buffers.emplace_back(static_cast<const char*>(p), bytes);
}

void check_global(const void* p, size_t bytes, const char* what) {
  if (state.buffers.empty()) return;
  const char* at = static_cast<const char*>(p);
  for (const auto& [begin, size] : state.buffers)
    if (at >= begin && at + bytes <= begin + size) return;
  static char text[96];
  std::snprintf(text, sizeof text, "%s of %zu bytes outside every registered buffer", what, bytes);
  fail(text);
}

}  // namespace cora::emu

// --- What tests drive through ctypes -------------------------------------------------------------------

extern "C" {
#define CORA_EMU_EXPORT __attribute__((visibility("default")))
using namespace cora::emu;

CORA_EMU_EXPORT void cora_emu_seed(unsigned seed) { state.seed = seed; }
CORA_EMU_EXPORT void cora_emu_device(int major, int count) {
  device_major = major;
  multiprocessors = count;
}

/// Breaks every kernel at place `site` (0, 1, ...) of a kind until the next call; kind 0 repairs.
CORA_EMU_EXPORT void cora_emu_mutate(int kind, int site) {
  state.mutation = static_cast<Mutation>(kind);
  state.mutated_site = site;
}

/// Places of a kind that kernels have passed so far: "file:line file:line ...", in the order of their numbers.
CORA_EMU_EXPORT const char* cora_emu_sites(int kind) {
  static std::string text;
  const auto& known = state.sites[kind];
  std::vector<std::string> names(known.size());
  for (const auto& [site, number] : known)
    names[static_cast<size_t>(number)] = site.first + ":" + std::to_string(site.second);
  text.clear();
  for (const std::string& name : names) text += name + " ";
  return text.c_str();
}

CORA_EMU_EXPORT void cora_emu_forget_sites() {
  for (auto& known : state.sites) known.clear();
}

/// Registers a buffer that kernels may touch; with none registered nothing is checked.
CORA_EMU_EXPORT void cora_emu_register(const void* p, size_t bytes) {
  state.buffers.emplace_back(static_cast<const char*>(p), bytes);
}
CORA_EMU_EXPORT void cora_emu_forget_buffers() { state.buffers.clear(); }
}
