"""Packed layers of every kind against torch's own layers with the dequantized weight."""

from __future__ import annotations

import copy

import pytest
import torch
from models import LAYERS, make_layer
from torch import Tensor, nn

from cora import QuantConv2d, QuantLinear, QuantSpec, ops
from cora.lowrank import ADAPTER_BITS, LayerShape, fold, unfold
from cora.modules import QUANT_LAYERS, QuantLayer, fake_quantize_dynamic
from cora.quantizer import choose_qparams

CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def packed_of(
    layer: nn.Module, spec: QuantSpec | None = None, rank: int = 1, **options
) -> QuantLayer:
    return QUANT_LAYERS[type(layer)].from_float(layer, spec or QuantSpec(3), rank, **options).eval()


def full_rank(layer: nn.Module) -> int:
    return LayerShape.of(layer).full_rank


def float_copy(layer: nn.Module, weight: Tensor) -> nn.Module:
    """The float layer with another weight."""
    twin = copy.deepcopy(layer)
    twin.weight = nn.Parameter(weight, requires_grad=False)
    return twin.requires_grad_(False)


def effective_weight(packed: QuantLayer) -> Tensor:
    """Dequantized codes plus adapter from the buffers, by loops over rows and groups."""
    shape = packed.shape
    codes = ops.unpack_bits(packed.codes, packed.bits, shape.columns).double()
    scale, zero = (
        p.double().expand(shape.rows, -1).repeat_interleave(shape.columns // p.shape[1], 1)
        for p in (packed.scale, packed.zero_point)
    )
    matrix = scale * (codes - zero)
    if packed.rank:
        rows = shape.rows // shape.groups
        for n in range(shape.rows):
            for r in range(packed.rank):
                k = n // rows * packed.rank + r
                unit = 1.0 if packed.adapter_scale is None else packed.adapter_scale[k].double()
                matrix[n] += unit * packed.adapter_b[n, r].double() * packed.adapter_a[k].double()
    transposed = getattr(packed, "transposed", False)
    return fold(matrix, packed.weight_shape, transposed, shape.groups).float()


def dynamic_input(x: Tensor, bits: int, items: int) -> Tensor:
    """Each item quantized by its own range widened to 0, in plain torch."""
    rows = x.reshape(items, -1)
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    codes = ((rows / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(x.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_forward(name: str) -> None:
    layer, x = make_layer(name)
    for rank, spec in [
        (0, QuantSpec(4)),
        (1, QuantSpec(3, "per_tensor", symmetric=True)),
        (min(2, full_rank(layer)), QuantSpec(2, "per_group", LayerShape.of(layer).columns)),
    ]:
        packed = packed_of(layer, spec, rank)
        weight = effective_weight(packed)
        torch.testing.assert_close(packed.weight, weight, atol=1e-6, rtol=1e-5)
        oracle = float_copy(layer, weight)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), oracle(x), **CLOSE)
            torch.testing.assert_close(packed(x[0]), oracle(x[0]), **CLOSE)
            merged = packed.to_float()
            assert type(merged) is type(layer) and not merged.weight.is_meta
            torch.testing.assert_close(merged(x), oracle(x), **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_rank_0_is_fake_quantize_and_full_rank_is_float(name: str) -> None:
    layer, x = make_layer(name)
    layer.requires_grad_(False)
    shape, transposed = LayerShape.of(layer), getattr(layer, "transposed", False)
    matrix = unfold(layer.weight, transposed, shape.groups)
    qparams = choose_qparams(matrix, QuantSpec(3))
    plain = ops.fake_quantize(matrix, qparams.scale, qparams.zero_point, 3)
    packed = packed_of(layer, rank=0)
    assert torch.equal(packed.weight, fold(plain, layer.weight.shape, transposed, shape.groups))
    assert packed.adapter_a is None and packed.stored_bits()["adapter"] == 0
    full = packed_of(layer, rank=shape.full_rank, adapter_bits=32)
    torch.testing.assert_close(full.weight, layer.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(full(x), layer(x), **CLOSE)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_activation_bits(name: str, bits: int) -> None:
    layer, x = make_layer(name)
    packed = packed_of(layer, activation_bits=bits)
    oracle = float_copy(layer, effective_weight(packed))
    items = x.numel() // x.shape[-1] if isinstance(layer, nn.Linear) else len(x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), oracle(dynamic_input(x, bits, items)), **CLOSE)
    scale, zero = torch.tensor([0.11]), torch.tensor([2**bits // 3], dtype=torch.int32)
    packed.set_activation_range(scale, zero)
    assert packed.stored_bits()["activation"] == 64
    codes = ((x / scale).round() + zero).clamp(0, 2**bits - 1)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), oracle((codes - zero) * scale), **CLOSE)


def test_fake_quantize_dynamic() -> None:
    x = torch.cat([torch.randn(3, 4, 5), torch.zeros(1, 4, 5), torch.rand(1, 4, 5) + 3])
    expected = dynamic_input(x + 0.0, 4, 5).nan_to_num()
    torch.testing.assert_close(fake_quantize_dynamic(x, 4), expected)


@pytest.mark.parametrize("adapter_bits", ADAPTER_BITS)
def test_adapter_bits(adapter_bits: int) -> None:
    for name in ("linear", "conv2d-grouped", "convtranspose2d-grouped"):
        layer, x = make_layer(name)
        packed = packed_of(layer, rank=2, adapter_bits=adapter_bits)
        oracle = float_copy(layer, effective_weight(packed))
        with torch.no_grad():
            torch.testing.assert_close(packed(x), oracle(x), **CLOSE)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_output_size(dims: int, batched: bool) -> None:
    cls = getattr(nn, f"ConvTranspose{dims}d")
    layer = cls(4, 6, 3, stride=2, padding=1).requires_grad_(False)
    packed = packed_of(layer)
    oracle = float_copy(layer, effective_weight(packed))
    x = torch.randn(2, 4, *(5,) * dims) if batched else torch.randn(4, *(5,) * dims)
    whole = [*((2, 6) if batched else (6,)), *(10,) * dims]
    for size in (whole[-dims:], whole, [9] * dims):
        torch.testing.assert_close(
            packed(x, output_size=size), oracle(x, output_size=size), **CLOSE
        )
    with pytest.raises(ValueError, match="output"):
        packed(x, output_size=[20] * dims)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["linear", "conv1d-plain", "conv2d-plain", "conv3d-plain", "convtranspose2d-strided"]
)
def test_reduced_precision(name: str, dtype: torch.dtype) -> None:
    """Activations change their type, what is stored does not, there and back."""
    layer, x = make_layer(name)
    for options in ({"adapter_bits": 8}, {"adapter_bits": 32, "activation_bits": 8}):
        packed = packed_of(layer, **options)
        if "activation_bits" in options:
            packed.set_activation_range(
                torch.tensor([1 / 3e4]), torch.tensor([7], dtype=torch.int32)
            )
        packed.scale.mul_(1 + 2**-20)  # not a float16 any more
        before = {key: value.clone() for key, value in packed.state_dict().items()}
        low = packed.to(dtype)
        y = low(x.to(dtype))
        assert y.dtype == dtype
        tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
        torch.testing.assert_close(y.float(), packed(x), atol=tolerance, rtol=tolerance)
        for moved in (low, low.float(), low.cpu()):
            after = moved.state_dict()
            assert before.keys() == after.keys()
            for key, value in before.items():
                assert torch.equal(value, after[key]) and value.dtype == after[key].dtype, key


def test_copies_and_state_dict() -> None:
    layer, x = make_layer("conv2d-plain")
    packed = packed_of(layer, rank=2, activation_bits=8)
    packed.set_activation_range(torch.tensor([0.02]), torch.tensor([100]))
    y = packed(x)
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(x), y)
    twin.codes.zero_()
    twin.prepare()
    assert not torch.equal(twin(x), y) and torch.equal(packed(x), y)
    twin.load_state_dict(packed.state_dict())
    assert torch.equal(twin(x), y)
    assert not list(packed.parameters()) and all(not t.requires_grad for t in packed.buffers())
    assert packed.to("meta").codes.is_meta


def test_state_of_a_layer_with_other_zero_points() -> None:
    """A layer made symmetric does not forget the zero-points it is given."""
    layer, x = make_layer("conv2d-plain")
    symmetric, other = (packed_of(layer, QuantSpec(3, symmetric=s)) for s in (True, False))
    middle = symmetric.packed_weight()
    symmetric.load_state_dict(other.state_dict())
    assert torch.equal(symmetric(x), other(x))
    given, expected = symmetric.packed_weight(), other.packed_weight()
    assert torch.equal(given.qparams.zero_point, expected.qparams.zero_point)
    assert middle.qparams.symmetric and not given.qparams.symmetric


@pytest.mark.parametrize("name", ["linear", "conv2d-strided", "convtranspose2d-plain"])
def test_float_layer_stays(name: str) -> None:
    layer, _ = make_layer(name)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    packed = packed_of(layer)
    if packed.bias is not None:
        packed.bias.add_(1)
    packed.weight.add_(1)
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in before.items())


def test_strange_memory_layouts() -> None:
    conv, x = make_layer("conv2d-plain")
    expected = packed_of(conv)
    permuted = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    assert torch.equal(packed_of(permuted).codes, expected.codes)
    with torch.no_grad():
        y = expected(x)
        torch.testing.assert_close(expected(x.to(memory_format=torch.channels_last)), y)
        torch.testing.assert_close(expected(torch.cat([x, x], 3)[..., : x.shape[3]]), y)
    linear = nn.Linear(6, 4)
    turned = copy.deepcopy(linear)
    turned.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    assert not turned.weight.is_contiguous()
    assert torch.equal(packed_of(turned).codes, packed_of(linear).codes)
    z = torch.randn(3, 5, 6)
    linear_packed = packed_of(linear)
    torch.testing.assert_close(linear_packed(z.mT.contiguous().mT), linear_packed(z))
    assert linear_packed(torch.zeros(0, 6)).shape == (0, 4)


def test_constant_zero_and_single_weights() -> None:
    for value in (0.0, 0.3, -2.0):
        for layer, x in (
            (nn.Linear(1, 1), torch.randn(2, 1)),
            (nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5)),
        ):
            nn.init.constant_(layer.weight, value)
            layer.requires_grad_(False)
            packed = packed_of(layer, QuantSpec(2), rank=1)
            torch.testing.assert_close(packed.weight, layer.weight, atol=0, rtol=0)
            torch.testing.assert_close(packed(x), layer(x), **CLOSE)


def test_stored_bits_is_the_bytes_of_the_buffers() -> None:
    layer, _ = make_layer("conv2d-grouped")
    packed = packed_of(layer, QuantSpec(8, symmetric=True), rank=2)
    size = {key: 8 * t.numel() * t.element_size() for key, t in packed.state_dict().items()}
    assert packed.stored_bits() == {
        "weight": size["codes"] + size["scale"] // 2,
        "adapter": size["adapter_a"] + size["adapter_b"] + size["adapter_scale"],
        "bias": size["bias"],
        "activation": 0,
    }


def test_from_float_errors() -> None:
    conv, linear = nn.Conv2d(3, 4, 3), nn.Linear(6, 4)
    with pytest.raises(TypeError, match="QuantConv2d.from_float: layer must be Conv2d, got Linear"):
        QuantConv2d.from_float(linear, QuantSpec())
    for rank in (-1, 5):
        with pytest.raises(ValueError, match=rf"Conv2d: rank must be 0..4, got {rank}"):
            QuantConv2d.from_float(conv, QuantSpec(), rank=rank)
    for bits in (0, 1, 9, 3.5, True, "8"):
        with pytest.raises(ValueError, match="activation_bits must be None or 2..8, got"):
            QuantLinear.from_float(linear, QuantSpec(), 1, bits)
    with pytest.raises(ValueError, match="adapter_bits must be one of"):
        QuantLinear.from_float(linear, QuantSpec(), 1, adapter_bits=1)
    with pytest.raises(ValueError, match="group_size must divide the 27 weights"):
        QuantConv2d.from_float(conv, QuantSpec(granularity="per_group", group_size=4), 1)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="Linear: weight must be finite"):
        QuantLinear.from_float(linear, QuantSpec(), 1)


def test_default_arguments() -> None:
    packed = QuantLinear.from_float(nn.Linear(32, 16))
    assert (packed.bits, packed.rank, packed.adapter_bits, packed.activation_bits) == (
        4,
        8,
        8,
        None,
    )
    assert "bits=4, rank=8" in repr(packed)
