// Memory that a call works in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace cora {

/// A block of at least `bytes`, aligned to 64, from those that this thread has given back: malloc hands large blocks
/// back to the system, which clears their pages anew at every call. Throws std::bad_alloc.
void* take_scratch(size_t bytes);
/// Keeps the block for the thread's next calls, up to a few MiB in all.
void give_scratch(void* block, size_t bytes);

/// 64-byte aligned, uninitialised, with kSlack bytes to spare: kernels may read a little past the end.
constexpr int64_t kSlack = 64;
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : Buffer(static_cast<size_t>(count) * sizeof(T) + kSlack, 0) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Give {
    size_t bytes = 0;
    void operator()(T* p) const { give_scratch(p, bytes); }
  };
  Buffer(size_t bytes, int) : data_(static_cast<T*>(take_scratch(bytes)), Give{bytes}) {}
  std::unique_ptr<T, Give> data_;
};

}  // namespace cora
