"""Pooling of codes against torch's own pooling of floats: bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cora import ops, reference

WINDOWS: dict[str, dict[str, Any]] = {
    "resnet": {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    "vgg": {"kernel_size": (2, 2), "stride": (2, 2)},
    "uneven": {"kernel_size": (1, 4), "stride": (2, 3), "padding": (0, 2)},
    "dilated": {"kernel_size": (2, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (3, 2)},
    "ceil": {"kernel_size": (3, 3), "stride": (2, 2), "ceil_mode": True},
    "ceil-padded": {
        "kernel_size": (2, 2),
        "stride": (3, 3),
        "padding": (1, 1),
        "ceil_mode": True,
    },
}
SHAPES = [(2, 3, 9, 11), (1, 64, 7, 8), (1, 1, 6, 6), (3, 33, 8, 7), (1, 200, 5, 9), (0, 3, 8, 8)]


def codes(shape: tuple[int, ...], halo: int, zero_point: int) -> torch.Tensor:
    """Random codes in a border of zero_point, most of them below it."""
    inner = torch.randint(0, 256, shape, dtype=torch.uint8).clamp(max=zero_point // 2 + 1)
    return reference._with_halo(inner, zero_point, halo)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_max_pool(isa: str, window: str, shape: tuple[int, ...]) -> None:
    for x_halo, out_halo, zero_point in ((0, 0, 0), (1, 0, 200), (0, 2, 7), (3, 1, 255)):
        x = codes(shape, x_halo, zero_point)
        options = {**WINDOWS[window], "out_halo": out_halo}
        got = ops.max_pool2d_codes(x, zero_point, x_halo, **options)
        assert torch.equal(got, reference.max_pool2d_codes(x, zero_point, x_halo, **options))
        assert got.is_contiguous(memory_format=torch.channels_last)
        contiguous = ops.max_pool2d_codes(x.contiguous(), zero_point, x_halo, **options)
        assert torch.equal(got, contiguous)


@pytest.mark.parametrize("shape", [(2, 3, 9, 11), (1, 600, 7, 7), (3, 5, 1, 1), (0, 3, 2, 2)])
def test_mean(shape: tuple[int, ...]) -> None:
    for halo, zero_point, scale in ((0, 0, 0.1), (1, 200, 3e-3), (3, 255, 7.0)):
        x = codes(shape, halo, zero_point)
        got = ops.mean_codes(x, scale, zero_point, halo)
        expected = reference.mean_codes(x, scale, zero_point, halo)
        torch.testing.assert_close(got, expected, atol=1e-5 * scale, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 9, 11), (1, 600, 7, 7), (3, 5, 1, 1), (0, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mean_of_pixels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(4)) + 100).to(dtype)
    expected = reference.mean_pixels(x)
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        got = ops.mean_pixels(laid_out)
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got, expected, atol=0.0, rtol=torch.finfo(dtype).eps)
    assert torch.equal(ops.mean_pixels(x[:, 1:, :, ::2]), ops.mean_pixels(x[:, 1:, :, ::2].clone()))


def test_mean_of_many_pixels() -> None:
    x = torch.full((1, 2, 300, 70000), 255, dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last
    )
    assert ops.mean_codes(x, 1.0, 0).tolist() == [[255.0, 255.0]]
    assert ops.mean_codes(x, 1.0, 255).tolist() == [[0.0, 0.0]]
    y = torch.full((1, 2, 300, 7000), 0.1)
    assert torch.equal(ops.mean_pixels(y), torch.full((1, 2), 0.1))


def test_a_window_that_misses_the_image() -> None:
    """Taps before and behind it only: the smallest code, nothing is read beyond the image."""
    x = codes((1, 3, 2, 2), 0, 9)
    y = ops.max_pool2d_codes(x, 9, 0, kernel_size=2, stride=1, padding=1, dilation=3)
    assert y.shape == (1, 3, 1, 1) and not y.any()


def test_threads(threads: Any) -> None:
    x = codes((4, 96, 40, 40), 1, 20)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(
            (
                ops.max_pool2d_codes(x, 20, 1, 3, 2, 1, out_halo=1),
                ops.mean_codes(x, 0.1, 20, 1),
                ops.mean_pixels(x.float()),
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
