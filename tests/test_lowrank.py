"""Weights as matrices, and adapters against numpy's singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import LAYERS, make_layer
from torch import Tensor, nn

from cora import QuantSpec
from cora.lowrank import (
    ADAPTER_BITS,
    LayerShape,
    factors,
    fold,
    quantize_adapter,
    rank_bits,
    truncate,
    unfold,
)
from cora.modules import QuantLinear
from cora.quantizer import SUPPORTED_BITS
from cora.serialization import _pack_adapter

GROUPED = [(8, 12, 1), (12, 8, 1), (12, 5, 3), (6, 9, 6), (1, 1, 1)]


def unfold_by_loops(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """Row n, column (input channel, kernel position), one element at a time."""
    if not transposed:
        return torch.stack([row.reshape(-1) for row in weight])
    inputs, outputs = weight.shape[:2]
    rows = []
    for n in range(groups * outputs):
        group, column = divmod(n, outputs)
        own = range(group * inputs // groups, (group + 1) * inputs // groups)
        rows.append(torch.cat([weight[i, column].reshape(-1) for i in own]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", LAYERS)
def test_unfold_and_fold(name: str) -> None:
    layer, _ = make_layer(name)
    shape, transposed = LayerShape.of(layer), getattr(layer, "transposed", False)
    matrix = unfold(layer.weight, transposed, shape.groups)
    assert list(matrix.shape) == [shape.rows, shape.columns]
    assert shape.full_rank == min(shape.rows // shape.groups, shape.columns)
    assert torch.equal(matrix, unfold_by_loops(layer.weight, transposed, shape.groups))
    assert torch.equal(fold(matrix, layer.weight.shape, transposed, shape.groups), layer.weight)


def by_numpy(residual: Tensor, rank: int, groups: int, moment: Tensor | None) -> np.ndarray:
    """Best approximation of a rank in each group: SVD of the residual times the moment's root."""
    rows = residual.shape[0] // groups
    blocks = []
    for g in range(groups):
        block = residual[g * rows : (g + 1) * rows].double().numpy()
        root = np.eye(block.shape[1])
        if moment is not None:
            root = np.linalg.cholesky(moment[g % len(moment)].double().numpy())
        u, s, vh = np.linalg.svd(block @ root, full_matrices=False)
        blocks.append((u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(root))
    return np.concatenate(blocks)


def random_moment(groups: int, columns: int) -> Tensor:
    x = torch.randn(groups, 3 * columns + 5, columns) * torch.logspace(-1, 1, columns)
    return x.transpose(1, 2) @ x + 1e-2 * torch.eye(columns)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("rows", "columns", "groups"), GROUPED)
def test_factors_are_the_best_at_every_rank(
    rows: int, columns: int, groups: int, weighted: bool
) -> None:
    residual = torch.randn(rows, columns) * 0.1
    moment = random_moment(groups, columns) if weighted else None
    a, b, singular_values = factors(residual, groups, moment)
    full = min(rows // groups, columns)
    assert (a.shape, b.shape) == ((groups * full, columns), (rows, full))
    assert (singular_values.diff(dim=1) <= 1e-6).all()
    for rank in range(full + 1):
        adapter = quantize_adapter(*truncate(a, b, rank, groups), 32, groups)
        assert adapter.rank == rank
        best = torch.from_numpy(by_numpy(residual, rank, groups, moment))
        torch.testing.assert_close(adapter.matrix().double(), best, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(adapter.matrix(), residual, atol=1e-5, rtol=1e-4)
    if weighted:  # what is left at the output is the tail of the singular values
        left = residual - quantize_adapter(*truncate(a, b, full // 2, groups), 32, groups).matrix()
        left = left.reshape(groups, -1, columns).double()
        error = ((left @ moment.double()) * left).sum()
        tail = singular_values[:, full // 2 :].double().square().sum()
        torch.testing.assert_close(error, tail, rtol=1e-3, atol=1e-6)


def test_one_moment_serves_all_groups() -> None:
    residual, moment = torch.randn(12, 5), random_moment(1, 5)
    shared, copied = factors(residual, 3, moment), factors(residual, 3, moment.repeat(3, 1, 1))
    for x, y in zip(shared, copied, strict=True):
        torch.testing.assert_close(x, y)


def test_truncations_nest() -> None:
    a, b, _ = factors(torch.randn(12, 10), 3)
    a4, b4 = truncate(a, b, 4, 3)
    for rank in range(4):
        for x, y in zip(truncate(a4, b4, rank, 3), truncate(a, b, rank, 3), strict=True):
            assert torch.equal(x, y)
    per_group = a.reshape(3, 4, 10)
    assert torch.equal(truncate(a, b, 2, 3)[0], torch.cat([g[:2] for g in per_group]))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize(("rows", "columns", "groups"), GROUPED)
def test_quantize_adapter(bits: int, rows: int, columns: int, groups: int) -> None:
    a, b, _ = factors(torch.randn(rows, columns), groups)
    rank = b.shape[1]
    adapter = quantize_adapter(a, b, bits, groups)
    top = 2 ** (bits - 1) - 1
    assert adapter.a.dtype == adapter.b.dtype == torch.int8
    assert adapter.scale is not None and list(adapter.scale.shape) == [groups * rank]
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    size = rows // groups
    for g in range(groups):
        for r in range(rank):
            row = a[g * rank + r].double()
            column = b[g * size : (g + 1) * size, r].double()
            step_a, step_b = row.abs().max() / top, column.abs().max() / top
            codes_a, codes_b = (row / step_a).round(), (column / step_b).round()
            assert max(codes_a.abs().max(), codes_b.abs().max()) == top
            product = torch.outer(codes_b * step_b, codes_a * step_a)
            expected[g * size : (g + 1) * size] += product
    assert adapter.a.abs().max() <= top and adapter.b.abs().max() <= top
    torch.testing.assert_close(adapter.matrix().double(), expected, atol=1e-5, rtol=1e-4)


def test_float_adapters() -> None:
    a, b = torch.randn(3, 7), torch.randn(5, 3)
    exact = quantize_adapter(a, b, 32)
    assert torch.equal(exact.a, a) and torch.equal(exact.b, b) and exact.scale is None
    half = quantize_adapter(a, b, 16)
    assert half.a.dtype == half.b.dtype == torch.float16 and half.scale is None
    torch.testing.assert_close(half.matrix(), b @ a, atol=1e-2, rtol=1e-2)
    for bits in (1, 9, 12, 64, "8"):
        with pytest.raises(ValueError, match="adapter_bits must be one of 2, 3, .* got"):
            quantize_adapter(a, b, bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", ADAPTER_BITS)
def test_zero_and_huge_factors(bits: int) -> None:
    zero = quantize_adapter(torch.zeros(2, 4), torch.zeros(3, 2), bits)
    assert torch.equal(zero.matrix(), torch.zeros(3, 4))
    none = quantize_adapter(torch.zeros(0, 4), torch.zeros(3, 0), bits)
    assert none.rank == 0 and torch.equal(none.matrix(), torch.zeros(3, 4))
    if bits >= 8:  # one factor beyond float16, as of a moment of tiny inputs
        a, b = torch.randn(2, 4) * 1e6, torch.randn(3, 2) * 1e-6
        found = quantize_adapter(a, b, bits).matrix()
        torch.testing.assert_close(found, b @ a, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("bits", ADAPTER_BITS)
@pytest.mark.parametrize(("rows", "columns", "groups"), GROUPED)
def test_rank_bits_is_what_is_stored(bits: int, rows: int, columns: int, groups: int) -> None:
    a, b, _ = factors(torch.randn(rows, columns), groups)
    for rank in range(1, b.shape[1] + 1):
        adapter = quantize_adapter(*truncate(a, b, rank, groups), bits, groups)
        parts = [_pack_adapter(adapter.a, bits), _pack_adapter(adapter.b.T.contiguous(), bits)]
        parts += [] if adapter.scale is None else [adapter.scale]
        stored = sum(8 * part.numel() * part.element_size() for part in parts)
        assert stored == rank * rank_bits(LayerShape(rows, columns, groups), bits)


def test_weighting_serves_the_output() -> None:
    """On inputs of uneven scale the weighted adapter leaves less error at the layer's output."""
    layer = nn.Linear(24, 16, bias=False).requires_grad_(False)
    x = torch.randn(400, 24) * torch.logspace(-1.5, 1, 24)
    spec, moment = QuantSpec(3), (x.T @ x + 1e-3 * torch.eye(24)).unsqueeze(0)
    errors = [
        float((QuantLinear.from_float(layer, spec, 3, moment=m)(x) - layer(x)).square().mean())
        for m in (None, moment)
    ]
    assert errors[1] < 0.7 * errors[0]
