#include "ops/cuda_door.h"

#include <dlfcn.h>

#include <string>

namespace cora {

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
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda == nullptr
               ? nullptr
               : reinterpret_cast<GetStream*>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(t.get_device_index(), &stream) != 0)
    fail(op,
         "torch does not tell its current CUDA stream (libtorch_cuda.so has no aoti_torch_get_current_cuda_stream)");
  return stream;
}

}  // namespace cora
