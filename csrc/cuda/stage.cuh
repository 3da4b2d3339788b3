// x as the GEMM reads it; see stage.cu.
#pragma once

#include "cuda/api.h"

namespace cora::cuda {

/// Slices an item's range is taken in.
int range_slices(int64_t elements);
/// Fills x_scale and x_zero of the workspace.
const char* stage_parameters(const Input& x, int channels, const Plan& plan, uint8_t* workspace, void* stream);
/// Fills x of the workspace.
const char* stage_input(const LayerShape& shape, const Input& x, const Plan& plan, uint8_t* workspace, void* stream);

int64_t values_bytes(const Input& x, int channels);
const char* values(const Input& x, int channels, float* out, uint8_t* workspace, void* stream);
const char* finish(const void* y, int type, PixelStrides strides, int items, int height, int width, int channels,
                   const float* bias, const Epilogue& epilogue, void* stream);

}  // namespace cora::cuda
