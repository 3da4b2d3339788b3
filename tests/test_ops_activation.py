"""Codes of activations against the oracle, on every CPU level: bit for bit."""

from __future__ import annotations

import pytest
import torch
from shapes import ALL_BITS, RAGGED

from cora import ops, reference

IMAGES = [
    (2, 3, 9, 37),  # an image: its own case in the kernels
    (1, 1, 5, 16),
    (1, 2, 6, 5),
    (2, 4, 3, 33),
    (1, 16, 4, 16),
    (1, 37, 7, 7),
    (2, 64, 5, 17),
    (3, 5, 1, 1),
    (2, 0, 3, 3),
    (0, 3, 4, 4),
    (1, 3, 0, 4),
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def hard_values(shape: tuple[int, ...], scale: float) -> torch.Tensor:
    """Random values, ties between two codes, their neighbours, and everything that is special."""
    x = torch.randn(shape) * 40 * scale
    flat = x.view(-1)
    ties = (torch.randint(-300, 300, flat.shape) + 0.5) * scale
    near = torch.nextafter(ties, torch.randn_like(ties) * 1e9)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 3e38, -3e38])
    kind = torch.randint(0, 8, flat.shape)
    flat[:] = torch.where(kind < 2, ties, torch.where(kind < 4, near, flat))
    pick = special[torch.randint(0, len(special), flat.shape)]
    flat[:] = torch.where(kind == 4, pick, flat)
    return x


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("halo", [0, 1, 3])
def test_images(isa: str, shape: tuple[int, ...], layout: str, halo: int) -> None:
    x = hard_values(shape, 0.1).contiguous(memory_format=LAYOUTS[layout])
    codes = ops.quantize_activation(x, 0.1, 37, 8, halo)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, reference.quantize_activation(x, 0.1, 37, 8, halo))
    back = ops.dequantize_activation(codes, 0.1, 37, halo)
    assert torch.equal(back, reference.dequantize_activation(codes, 0.1, 37, halo))
    assert back.shape == x.shape and back.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("scale", [1.0, 0.3, 7e-4, 1e-30, 1e-42, 1e38])
def test_every_scale_rounds_as_a_division(isa: str, bits: int, scale: float) -> None:
    for zero_point in (0, 2**bits // 3, 2**bits - 1):
        x = hard_values((1, 3, 40, 67), scale)
        for t in (x, x.flatten()):
            codes = ops.quantize_activation(t, scale, zero_point, bits)
            assert torch.equal(codes, reference.quantize_activation(t, scale, zero_point, bits))
        back = ops.dequantize_activation(codes, scale, zero_point)
        assert torch.equal(back, reference.dequantize_activation(codes, scale, zero_point))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (4, 0, 3), *((n,) for n in RAGGED), (2, 6, 5, 7)])
def test_shapes_and_dtypes(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    codes = ops.quantize_activation(x, 0.02, 100)
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    assert torch.equal(codes, reference.quantize_activation(x, 0.02, 100))


@pytest.mark.parametrize("view", ["sliced", "transposed"])
def test_other_layouts(isa: str, view: str) -> None:
    x = torch.randn(3, 20, 9, 10)
    x = x[:, 3:, ::2, 1:] if view == "sliced" else x.transpose(2, 3)
    codes = ops.quantize_activation(x, 0.02, 100, 8, 1)
    assert torch.equal(codes, reference.quantize_activation(x, 0.02, 100, 8, 1))


def test_threads_agree(isa: str, threads) -> None:
    x, codes = torch.randn(3, 40, 33, 31), []
    for count in (1, 3):
        threads(count)
        codes.append(ops.quantize_activation(x, 0.02, 100, 8, 2))
    assert torch.equal(codes[0], codes[1])
