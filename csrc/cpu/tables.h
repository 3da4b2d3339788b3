// Who implements what, by level. cora.ops.isa() prints this; tests/test_ops_isa.py expects it.
#pragma once

#include "cpu/kernels.h"

namespace cora::cpu {

CORA_KERNEL_TABLE(FakeQuantizeFn, fake_quantize);
CORA_KERNEL_TABLE(FakeQuantizeBackwardFn, fake_quantize_backward);
CORA_KERNEL_TABLE(QuantizeS8Fn, quantize_s8);
CORA_KERNEL_TABLE(RangeFn, range);
CORA_KERNEL_TABLE_AVX2(PackRowFn, pack_row);
CORA_KERNEL_TABLE(UnpackRowFn, unpack_row);
CORA_KERNEL_TABLE(DequantizeFn, dequantize);

}  // namespace cora::cpu
