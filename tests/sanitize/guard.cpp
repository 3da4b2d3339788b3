// Preloaded: every aligned allocation, which means all of torch's tensors and the kernels' own buffers, ends at an
// inaccessible page. AddressSanitizer checks what the compiler generates from loads and stores, but not masked vector
// instructions or AMX tiles; here the processor finds an access past the end. What lies between an allocation's size
// and its alignment, and before its start, holds a pattern that free() checks. Freed memory is never given out again,
// so that a use after free faults too.
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kRegion = size_t{1} << 42;  // address space, not memory
constexpr uint8_t kPattern = 0xa5;
constexpr uint64_t kMagic = 0x6775617264656421;

struct Header {  // right before the data
  uint64_t magic;
  char* block;
  size_t pages, size;
};

char* region() {
  static char* const start =
      static_cast<char*>(mmap(nullptr, kRegion, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return start;
}

bool is_ours(const void* p) { return region() != MAP_FAILED && p >= region() && p < region() + kRegion; }

[[noreturn]] void die(const char* what, const void* p, size_t size) {
  std::fprintf(stderr, "guard: %s an allocation of %zu bytes at %p\n", what, size, p);
  std::abort();
}

void* allocate(size_t alignment, size_t size) {
  static std::atomic<size_t> used{0};
  const size_t room = (size + alignment - 1) / alignment * alignment;
  const size_t pages = (room + sizeof(Header) + kPage - 1) / kPage;
  const size_t at = used.fetch_add((pages + 1) * kPage);
  if (alignment > kPage || region() == MAP_FAILED || at + (pages + 1) * kPage > kRegion) return nullptr;
  char* block = region() + at;
  if (mprotect(block, pages * kPage, PROT_READ | PROT_WRITE) != 0) return nullptr;
  char* data = block + pages * kPage - room;
  for (char* p = block; p < data; ++p) *p = static_cast<char>(kPattern);
  for (char* p = data + size; p < data + room; ++p) *p = static_cast<char>(kPattern);
  reinterpret_cast<Header*>(data)[-1] = {kMagic, block, pages, size};
  return data;
}

}  // namespace

extern "C" {

int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = allocate(alignment, size);
  return *out == nullptr ? ENOMEM : 0;
}

void* aligned_alloc(size_t alignment, size_t size) { return allocate(alignment, size); }

void free(void* p) {
  if (p == nullptr) return;
  if (!is_ours(p)) {
    static auto* const next = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_NEXT, "free"));
    return next(p);
  }
  char* data = static_cast<char*>(p);
  const Header header = reinterpret_cast<Header*>(data)[-1];
  if (header.magic != kMagic) die("written before", p, 0);
  char* end = header.block + header.pages * kPage;
  for (const char* q = header.block; q < data - sizeof(Header); ++q)
    if (static_cast<uint8_t>(*q) != kPattern) die("written before", p, header.size);
  for (const char* q = data + header.size; q < end; ++q)
    if (static_cast<uint8_t>(*q) != kPattern) die("written past", p, header.size);
  madvise(header.block, header.pages * kPage, MADV_DONTNEED);
  mprotect(header.block, header.pages * kPage, PROT_NONE);
}

}  // extern "C"
