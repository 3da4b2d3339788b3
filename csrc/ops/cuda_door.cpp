#include "ops/cuda_door.h"

#if !defined(CORA_EMULATED)
#include <dlfcn.h>
#else
#include "emu/emulator.h"
#endif

#include <mutex>
#include <string>
#include <vector>

namespace cora {

#if defined(CORA_EMULATED)

const cuda::Api& cuda_api(const char*) { return cuda::library_api(); }
void* current_stream(const char*, const Tensor&) { return nullptr; }

CudaCall::CudaCall(const char* op, const Tensor&) : api(cuda_api(op)), stream(nullptr), op_(op) {}

#else

namespace {

/// Path of the library beside this one.
std::string library_path() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&library_path), &info) == 0 || info.dli_fname == nullptr)
    return "libcora_cuda.so";
  const std::string self = info.dli_fname;
  const size_t slash = self.rfind('/');
  return (slash == std::string::npos ? "" : self.substr(0, slash + 1)) + "libcora_cuda.so";
}

struct Opened {
  const cuda::Api* api = nullptr;
  std::string error;
};

Opened open_library() {
  Opened result;
  const std::string path = library_path();
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    result.error = std::string("the CUDA kernels are not there (") + dlerror() +
                   "): build cora where nvcc is found, or move the tensors to the CPU";
    return result;
  }
  using GetApi = const cuda::Api*();
  auto* get_api = reinterpret_cast<GetApi*>(dlsym(library, "cora_cuda_get_api"));
  const cuda::Api* api = get_api != nullptr ? get_api() : nullptr;
  if (api == nullptr || api->version != cuda::kApiVersion) {
    result.error = path + " belongs to another version of cora: build it again";
    return result;
  }
  result.api = api;
  return result;
}

}  // namespace

const cuda::Api& cuda_api(const char* op) {
  static const Opened opened = open_library();
  if (opened.api == nullptr) fail(op, opened.error);
  return *opened.api;
}

void* current_stream(const char* op, const Tensor& t) {
  // Not linked, so that _C.so loads beside a CPU-only torch; a CUDA tensor means libtorch_cuda.so is loaded.
  using GetStream = int32_t(int32_t, void**);
  static GetStream* const get_stream = [] {
    for (const char* library : {"libtorch_cuda.so", "libtorch_python.so", "libtorch.so"}) {
      void* opened = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
      if (opened == nullptr) continue;
      if (void* found = dlsym(opened, "aoti_torch_get_current_cuda_stream")) return reinterpret_cast<GetStream*>(found);
    }
    return static_cast<GetStream*>(nullptr);
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(t.get_device_index(), &stream) != 0)
    fail(op,
         "torch does not tell its current CUDA stream (libtorch_cuda.so has no aoti_torch_get_current_cuda_stream)");
  return stream;
}

namespace {
/// Once a device: whether it runs the kernels at all.
void check_device(const char* op, const cuda::Api& api, int64_t index) {
  static std::mutex mutex;
  static std::vector<bool> fine;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto i = static_cast<size_t>(index);
  if (fine.size() <= i) fine.resize(i + 1, false);
  if (fine[i]) return;
  const char* error = api.check_device();
  if (error != nullptr) fail(op, "CUDA device ", index, ": ", error);
  fine[i] = true;
}
}  // namespace

CudaCall::CudaCall(const char* op, const Tensor& t)
    : api(cuda_api(op)), stream(current_stream(op, t)), op_(op), guard_(t.get_device_index()) {
  check_device(op, api, t.get_device_index());
}

#endif

Tensor allocate(const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype, bool channels_last) {
  const auto format =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  Tensor t = torch::stable::empty({shape.data(), shape.size()}, dtype, std::nullopt, x.device(), std::nullopt, format);
#if defined(CORA_EMULATED)
  emu::allocated(t.mutable_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size());
#endif
  return t;
}

cuda::PixelStrides pixel_strides(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  return {t.size(0) == 1 ? h * w * c : t.stride(0), h == 1 ? w * c : t.stride(2), w == 1 ? c : t.stride(3),
          c == 1 ? 1 : t.stride(1)};
}

int element_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return cuda::kFloat16;
    case ScalarType::BFloat16: return cuda::kBfloat16;
    case ScalarType::Byte: return cuda::kUint8;
    case ScalarType::Char: return cuda::kInt8;
    default: return cuda::kFloat32;
  }
}

}  // namespace cora
