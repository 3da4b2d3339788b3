#include "ops/scratch.h"

#include <array>
#include <cstdlib>
#include <new>
#include <vector>

namespace cora {

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kPooled = false;  // a block that is kept has no end that it could watch
#else
constexpr bool kPooled = true;
#endif
constexpr size_t kLeast = 64, kKept = kPooled ? size_t{8} << 20 : 0;  // bytes, of a block and a thread

/// A thread's free blocks by size, powers of two.
class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    for (const auto& blocks : free_)
      for (void* block : blocks) std::free(block);
  }

  void* take(size_t bytes) {
    auto& blocks = free_[size_class(bytes)];
    if (blocks.empty()) {
      void* block = std::aligned_alloc(64, size_of(size_class(bytes)));
      if (block == nullptr) throw std::bad_alloc();
      return block;
    }
    void* block = blocks.back();
    blocks.pop_back();
    kept_ -= size_of(size_class(bytes));
    return block;
  }
  void give(void* block, size_t bytes) noexcept {
    const size_t index = size_class(bytes), size = size_of(index);
    if (kept_ + size > kKept) return std::free(block);
    try {
      free_[index].push_back(block);
      kept_ += size;
    } catch (const std::bad_alloc&) {
      std::free(block);
    }
  }

 private:
  static size_t size_of(size_t index) { return kLeast << index; }
  static size_t size_class(size_t bytes) {
    size_t index = 0;
    while (size_of(index) < bytes) ++index;
    return index;
  }
  std::array<std::vector<void*>, 56> free_;
  size_t kept_ = 0;
};

Pool& pool() {
  thread_local Pool of_thread;
  return of_thread;
}

}  // namespace

void* take_scratch(size_t bytes) { return pool().take(bytes); }
void give_scratch(void* block, size_t bytes) { pool().give(block, bytes); }

}  // namespace cora
