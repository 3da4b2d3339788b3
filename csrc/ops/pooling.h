// Pooling; cora/ops/activation.py documents the ops.
#pragma once

#include "check.h"

namespace cora {

Tensor max_pool2d_codes(Tensor x, int64_t zero_point, int64_t x_halo, std::vector<int64_t> kernel_size,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                        bool ceil_mode, int64_t out_halo);
Tensor mean_codes(Tensor x, double scale, int64_t zero_point, int64_t x_halo);
Tensor mean_pixels(Tensor x);

}  // namespace cora
