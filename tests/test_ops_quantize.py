"""fake_quantize, packing, dequantisation against the oracles, on every CPU level."""

from __future__ import annotations

import pytest
import torch
from shapes import ALL_BITS, RAGGED, qparams

from cora import ops, reference

GRANULARITIES = {
    "per-tensor": (1, 1),
    "per-channel": (6, 1),
    "per-group": (6, 4),
    "shared-groups": (1, 4),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forward_equals_oracle(isa: str, bits: int, granularity: str) -> None:
    rows, groups = GRANULARITIES[granularity]
    for far in (False, True):
        scale, zero_point = qparams(rows, groups, bits, far=far)
        x = torch.randn(6, 28, 3) * 3 - (scale.mean() * 2**23 if far else 0)
        got = ops.fake_quantize(x, scale, zero_point, bits, residual=True, codes=True)
        want = reference.fake_quantize(x, scale, zero_point, bits, residual=True, codes=True)
        for actual, expected in zip(got, want, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (1,), (97,), (3, 0), (0, 5), (33, 31), (2, 3, 5, 7)], ids=str
)
def test_shapes_and_dtypes(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale, zero_point = qparams(1, 1, 4)
    x = torch.randn(shape).to(dtype)
    got = ops.fake_quantize(x, scale, zero_point, 4, residual=True, codes=True)
    want = reference.fake_quantize(x, scale, zero_point, 4, residual=True, codes=True)
    for actual, expected in zip(got, want, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_half_to_even_and_clamping(isa: str) -> None:
    x = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 2.5, 99.0, float("inf"), float("-inf"), float("nan")]])
    _, codes = ops.fake_quantize(
        x, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int32), 3, codes=True
    )
    assert codes.tolist() == [[0, 1, 1, 3, 3, 7, 7, 0, 0]]


def test_non_contiguous_input(isa: str) -> None:
    scale, zero_point = qparams(7, 1, 4)
    x = torch.randn(12, 7).T
    assert torch.equal(
        ops.fake_quantize(x, scale, zero_point, 4), reference.fake_quantize(x, scale, zero_point, 4)
    )


def test_larger_than_a_chunk(isa: str) -> None:
    scale, zero_point = qparams(1, 1, 4)
    x = torch.randn(3, 20011)
    assert torch.equal(
        ops.fake_quantize(x, scale, zero_point, 4), reference.fake_quantize(x, scale, zero_point, 4)
    )


@pytest.mark.parametrize("parts", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [1, 5], ids=["per-tensor", "per-channel"])
def test_into_given_tensors(isa: str, parts: tuple[bool, bool], rows: int) -> None:
    """Large enough that stores bypass the caches; rows start anywhere in a cache line."""
    scale, zero_point = qparams(rows, 1, 4)
    for shape in ((5, 33), (5, 1_700_003)):
        x = torch.randn(shape)
        want = ops.fake_quantize(x, scale, zero_point, 4, residual=True, codes=True)
        room = [torch.full((x.numel() + 9,), 99, dtype=t.dtype) for t in want]
        for offset in (0, 1):  # 0: as torch aligns a tensor
            got = [t[offset : offset + x.numel()].view(shape) for t in room]
            given = [t if part else None for t, part in zip(got[1:], parts, strict=True)]
            ops.fake_quantize_out(x, scale, zero_point, 4, got[0], *given)
            for i, part in enumerate((True, *parts)):
                expected = want[i] if part else torch.full_like(want[i], 99)
                assert torch.equal(got[i], expected)
                assert (room[i][offset + x.numel() :] == 99).all()
                room[i].fill_(99)
    ops.fake_quantize_out(x, scale, zero_point, 4, x)  # in place
    assert torch.equal(x, want[0])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("residual", [False, True])
def test_backward_equals_oracle(isa: str, granularity: str, residual: bool) -> None:
    scale, zero_point = qparams(*GRANULARITIES[granularity], 3)
    x, weight = torch.randn(6, 28, 3), torch.randn(2, 6, 28, 3)
    grads = []
    for module in (ops, reference):
        leaf, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        out = module.fake_quantize(leaf, s, zero_point, 3, residual=residual)
        parts = out if residual else (out,)
        sum((part * w).sum() for part, w in zip(parts, weight, strict=False)).backward()
        grads.append((leaf.grad, s.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-5, atol=1e-4)


def test_backward_is_the_same_for_any_thread_count(isa: str, threads) -> None:
    scale, zero_point = qparams(1, 1, 4)
    x = torch.randn(64, 3001)
    grads = []
    for count in (1, 2, 3):
        threads(count)
        s = scale.clone().requires_grad_()
        ops.fake_quantize(x, s, zero_point, 4).square().sum().backward()
        grads.append(s.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantization_error(isa: str, threads, bits: int, granularity: str) -> None:
    rows, groups = GRANULARITIES[granularity]
    for k, far in ((84, False), (5000, False), (84, True)):
        scale, zero_point = (
            torch.stack(part)
            for part in zip(*(qparams(rows, groups, bits, far=far) for _ in range(3)), strict=True)
        )
        x = torch.randn(6, k) * 3 - (scale.mean() * 2**23 if far else 0)
        want = reference.quantization_error(x, scale, zero_point, bits)
        errors = []
        for count in (1, 3):
            threads(count)
            errors.append(ops.quantization_error(x, scale, zero_point, bits))
        assert torch.equal(*errors)
        torch.testing.assert_close(errors[0], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("k", (*RAGGED, 64, 200))
def test_packing(isa: str, bits: int, k: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, k), dtype=torch.uint8)
    packed = ops.pack_bits(codes, bits)
    assert packed.shape == (2, 3, (k * bits + 7) // 8)
    assert torch.equal(packed, reference.pack_bits(codes, bits))
    assert torch.equal(ops.unpack_bits(packed, bits, k), codes)


def test_packing_of_nothing(isa: str) -> None:
    assert ops.pack_bits(torch.zeros(0, 5, dtype=torch.uint8), 4).shape == (0, 3)
    assert ops.pack_bits(torch.zeros(5, 0, dtype=torch.uint8), 4).shape == (5, 0)
    assert ops.unpack_bits(torch.zeros(5, 0, dtype=torch.uint8), 4, 0).shape == (5, 0)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("rows,groups", [(1, 1), (5, 1), (5, 11), (1, 11)])
def test_dequantize(isa: str, bits: int, rows: int, groups: int) -> None:
    packed = ops.pack_bits(torch.randint(0, 2**bits, (5, 33), dtype=torch.uint8), bits)
    for far in (False, True):
        scale, zero_point = qparams(rows, groups, bits, far=far)
        got = ops.dequantize_packed(packed, scale, zero_point, bits, 33)
        assert torch.equal(got, reference.dequantize_packed(packed, scale, zero_point, bits, 33))


# The frozen layout: bytes written down once, for codes 0, 1, 2, ... modulo 2**bits.
GOLDEN = {
    2: "e4e4e4",
    3: "88c6fa8806",
    4: "1032547698ba",
    5: "2088418a3928a905",
    6: "40200c44611c48a22c",
    7: "8080604028180e88846201",
    8: "000102030405060708090a0b",
}


@pytest.mark.parametrize("bits", ALL_BITS)
def test_layout_is_frozen(isa: str, bits: int) -> None:
    codes = (torch.arange(12) % 2**bits).to(torch.uint8)
    for module in (ops, reference):
        assert bytes(module.pack_bits(codes, bits).tolist()).hex() == GOLDEN[bits]
