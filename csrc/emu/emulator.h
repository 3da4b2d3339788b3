// Runs CUDA kernels on the CPU, to test them where there is no GPU: two blocks at a time, every thread a fiber.
//
// What is modelled, because kernels break there:
//   - barriers and warp collectives are rendezvous; a thread that never comes is reported as a deadlock;
//   - the order in which warps and lanes run is drawn from a seed, so that a missing barrier shows;
//   - cp.async copies nothing until its wait, and its destination holds NaN until then;
//   - a warpgroup instruction runs when it is issued or as late as its wait, whichever the seed draws;
//   - shared memory starts as NaN (every byte 0xff) in each block;
//   - asynchronous copies and vector accesses are checked against the registered buffers.
// What is not: the memory model, bank conflicts, speed. An mma adds up in another order than the hardware.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cora::emu {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

/// Ways to break a kernel at one place of its source, to prove that the tests would see it.
enum class Mutation : int {
  kNone = 0,
  kSkipBarrier,    // __syncthreads() at the site does nothing
  kSkipWait,       // the wait for copies, or for warpgroup instructions, at the site does nothing
  kLateWait,       // ... waits for one group less
  kDropPredicate,  // cp.async at the site copies although its predicate is false
};

/// What the running thread sees as threadIdx and so on.
struct ThreadState {
  Dim3 thread, block;
};
extern ThreadState* current;
extern Dim3 grid_dim, block_dim;

/// Runs the kernel; false when a thread went wrong, and then error() says how.
bool launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
const char* error();  // null if the last launch was fine

char* shared_memory();
[[noreturn]] void fail(const char* message);  // ends the block

void block_barrier(const char* file, int line);
void atomic_done();  // others may run before the thread goes on

/// All 32 lanes hand in their operands; the last to come runs `work` on all 32.
void warp_collective(const void* identity, void* operands, void (*work)(void* const* lanes));

void async_copy(void* shared, const void* global, bool valid, const char* file, int line);
void async_commit();
void async_wait(int groups_left, const char* file, int line);

/// A warp's part of a warpgroup instruction, handed in by its last lane inside a warp_collective.
void warpgroup_issue(std::function<void()> work);
void warpgroup_commit();  // what was issued since is one group
void warpgroup_wait(int groups_left, const char* file, int line);

/// What the kernels find: compute capability 8 (99 KiB of shared memory a block) or 9 (227 KiB), and few
/// multiprocessors, so that small cases share tiles as large ones do on a GPU.
extern int device_major, multiprocessors;

/// A buffer the door made for a call: filled with NaN, each time of other bytes, so that what a kernel leaves unwritten
/// differs between two calls; and registered if buffers are.
void allocated(void* p, size_t bytes);

/// Fails unless [p, p + bytes) lies in a registered buffer (none registered: everything is fine).
void check_global(const void* p, size_t bytes, const char* what);

}  // namespace cora::emu
