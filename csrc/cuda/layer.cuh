// A call of a prepared layer: what will run (plan) and running it; see layer.cu.
#pragma once

#include "cuda/api.h"

namespace cora::cuda {

const char* plan(const LayerShape& shape, const Input& x, Plan* plan);
const char* run(const LayerShape& shape, const uint8_t* prepared, const Input& x, const Plan& plan,
                const Epilogue& epilogue, uint8_t* workspace, void* stream);

}  // namespace cora::cuda
