// Prepared layers; see prepare.cu.
#pragma once

#include "cuda/api.h"

namespace cora::cuda {

const char* prepare(const LayerShape& shape, const LayerParameters& parameters, uint8_t* prepared, void* stream);
const char* merge(const LayerShape& shape, const uint8_t* prepared, void* out, void* bias, int type, void* stream);

/// The fast way of merge, for what merges_by_tiles; see merge.cu.
const char* merge_by_tiles(const LayerShape& shape, const uint8_t* prepared, void* out, void* bias, int type,
                           void* stream);

}  // namespace cora::cuda
