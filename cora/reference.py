"""Slow, obvious oracles of every op in :mod:`cora.ops`, in plain torch.

Same names and arguments as the ops; imported by tests and benchmarks only. Sums are taken in
float64, so an oracle is closer to the true value than any kernel; integers are exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "conv2d_lowrank",
    "dequantize_activation",
    "dequantize_packed",
    "descend_codes",
    "error_feedback",
    "fake_quantize",
    "linear_lowrank",
    "lowrank_factors",
    "max_pool2d_codes",
    "mean_codes",
    "mean_pixels",
    "pack_bits",
    "prepare_layer",
    "quantization_error",
    "quantize_activation",
    "residual_svd_init",
    "run_layer",
    "unpack_bits",
]


def _expand(param: Tensor, rows: int, cols: int) -> Tensor:
    """Scale or zero-point [R, G] -> [rows, cols]."""
    return param.repeat_interleave(cols // param.shape[1], dim=1).expand(rows, cols)


def _as_matrix(x: Tensor) -> Tensor:
    if x.dim() < 2:
        return x.reshape(1, -1)
    return x.reshape(x.shape[0], x[0].numel() if x.shape[0] else x.shape[1:].numel())


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    residual: bool = False,
    codes: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Differentiable by torch's own autograd: a straight-through round inside a clamp."""
    matrix = _as_matrix(x).float()
    s, z = (_expand(p, *matrix.shape) for p in (scale, zero_point))
    ratio = matrix / s
    rounded = ratio + (ratio.round() - ratio).detach()
    q = (rounded + z).clamp(0, 2**bits - 1)
    out = (s * (q - z)).reshape(x.shape)
    results = [out.to(x.dtype)]
    if residual:
        results.append((x.float() - out).to(x.dtype))
    if codes:
        results.append(q.detach().reshape(x.shape).to(torch.uint8))
    return results[0] if len(results) == 1 else tuple(results)


def quantization_error(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Squared residuals of one fake quantization a candidate, summed in float64."""
    errors = []
    for s, z in zip(scale, zero_point, strict=True):
        residual = fake_quantize(x, s, z, bits, residual=True)[1].double()
        by_row = residual.square().reshape(x.shape[0], s.shape[1], -1).sum(-1)
        errors.append(by_row if s.shape[0] > 1 else by_row.sum(0, keepdim=True))
    return torch.stack(errors)


def error_feedback(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, factor: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """One column after the other, all later columns corrected at once."""
    n, k = x.shape
    groups = len(factor)
    codes, error = torch.empty(n, k), torch.zeros(n, dtype=torch.float64)
    s, z = (_expand(p, n, k) for p in (scale, zero_point))
    for g in range(groups):
        rows = slice(g * n // groups, (g + 1) * n // groups)
        w = x[rows, order[g]].clone()
        for i, column in enumerate(order[g].tolist()):
            step, zero = s[rows, column], z[rows, column]
            q = ((w[:, i] / step).round() + zero).clamp(0, 2**bits - 1)
            e = (w[:, i] - step * (q - zero)) / factor[g, i, i]
            w[:, i + 1 :] -= e[:, None] * factor[g, i, i + 1 :]
            codes[rows, column] = q
            error[rows] += e.double().square()
    return codes.to(torch.uint8), error


def descend_codes(
    codes: Tensor, gradient: Tensor, scale: Tensor, curvature: Tensor, bits: int
) -> Tensor:
    """One row after the other."""
    result = codes.clone()
    for g in range(len(codes)):
        for row, slope, s in zip(result[g], gradient[g].clone(), scale[g], strict=True):
            for k, before in enumerate(row.tolist()):
                wanted = (before + slope[k] / (s[k] * curvature[g, k, k])).round()
                row[k] = wanted.nan_to_num(nan=0.0).clamp(0, 2**bits - 1)
                slope[k + 1 :] -= s[k] * (row[k] - before) * curvature[g, k, k + 1 :]
    return result


def quantize_activation(
    x: Tensor, scale: float, zero_point: int, bits: int = 8, halo: int = 0
) -> Tensor:
    """Codes, an image channels_last inside a border of the code zero_point."""
    q = (x.float() / torch.tensor(scale, dtype=torch.float32)).round() + zero_point
    codes = q.nan_to_num(nan=0.0).clamp(0, 2**bits - 1).to(torch.uint8)
    if x.dim() != 4:
        return codes
    return _with_halo(codes, zero_point, halo)


def dequantize_activation(codes: Tensor, scale: float, zero_point: int, halo: int = 0) -> Tensor:
    """scale * (q - zero_point), an image without its border."""
    x = torch.tensor(scale, dtype=torch.float32) * (codes.int() - zero_point).float()
    if codes.dim() != 4:
        return x
    return _without_halo(x, halo).contiguous(memory_format=torch.channels_last)


def max_pool2d_codes(
    x: Tensor,
    zero_point: int,
    x_halo: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    out_halo: int = 0,
) -> Tensor:
    """torch's max pool of the codes as floats, without the border."""
    image = _without_halo(x, x_halo).float()
    codes = F.max_pool2d(image, kernel_size, stride, padding, dilation, ceil_mode).to(torch.uint8)
    return _with_halo(codes, zero_point, out_halo)


def mean_codes(x: Tensor, scale: float, zero_point: int, x_halo: int = 0) -> Tensor:
    """Mean of the numbers, in float64."""
    s = torch.tensor(scale, dtype=torch.float32).double()
    return ((_without_halo(x, x_halo).double() - zero_point) * s).mean((2, 3)).float()


def mean_pixels(x: Tensor) -> Tensor:
    """Mean of the pixels, in float64."""
    return x.double().mean((2, 3)).to(x.dtype)


def _without_halo(codes: Tensor, halo: int) -> Tensor:
    height, width = codes.shape[2:]
    return codes[:, :, halo : height - halo, halo : width - halo]


def _with_halo(codes: Tensor, zero_point: int, halo: int) -> Tensor:
    codes = F.pad(codes, (halo, halo, halo, halo), value=zero_point)
    return codes.contiguous(memory_format=torch.channels_last)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Code i occupies bits [i*bits, (i+1)*bits) of its row, least significant first."""
    k = codes.shape[-1]
    rows = codes.reshape(-1, k).long()
    stream = torch.stack([(rows >> b) & 1 for b in range(bits)], dim=-1).reshape(rows.shape[0], -1)
    stream = F.pad(stream, (0, -stream.shape[1] % 8)).reshape(rows.shape[0], -1, 8)
    packed = (stream << torch.arange(8)).sum(-1).to(torch.uint8)
    return packed.reshape(*codes.shape[:-1], packed.shape[-1])


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of :func:`pack_bits`."""
    rows = packed.reshape(-1, packed.shape[-1]).long()
    stream = torch.stack([(rows >> b) & 1 for b in range(8)], dim=-1).reshape(rows.shape[0], -1)
    stream = stream[:, : k * bits].reshape(rows.shape[0], k, bits)
    codes = (stream << torch.arange(bits)).sum(-1).to(torch.uint8)
    return codes.reshape(*packed.shape[:-1], k)


def dequantize_packed(
    packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, k: int
) -> Tensor:
    """scale * (q - zero_point), float32 [N, K]."""
    n = packed.shape[0]
    q = unpack_bits(packed, bits, k).int()
    return _expand(scale, n, k) * (q - _expand(zero_point, n, k)).float()


def lowrank_factors(
    residual: Tensor, rank: int, groups: int = 1, moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """By an SVD in float64 of residual @ moment^(1/2), group by group."""
    n, k = residual.shape
    a, b, s = [], [], []
    for g in range(groups):
        block = residual.reshape(groups, n // groups, k)[g].double()
        root, inverse = torch.eye(k, dtype=torch.float64), torch.eye(k, dtype=torch.float64)
        if moment is not None:
            values, vectors = torch.linalg.eigh(moment[g % moment.shape[0]].double())
            values = values.clamp_min(values.max() * 1e-14)
            root, inverse = vectors * values.sqrt(), (vectors / values.sqrt()).T
        u, sv, vh = torch.linalg.svd(block @ root, full_matrices=False)
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        u, vh = u * sign, vh * sign.T
        half = sv[:rank].sqrt()
        a.append(half[:, None] * (vh[:rank] @ inverse))
        b.append(u[:, :rank] * half)
        s.append(sv)
    return torch.cat(a).float(), torch.cat(b).float(), torch.stack(s).float()


def residual_svd_init(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    rank: int,
    groups: int = 1,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantise, take the residual, factorise it."""
    matrix = _as_matrix(weight)
    _, residual, codes = fake_quantize(matrix, scale, zero_point, bits, residual=True, codes=True)
    a, b, s = lowrank_factors(residual, rank, groups, moment)
    return pack_bits(codes, bits), a, b, s, residual


def _quantize_input(
    x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None, x_bits: int
) -> Tensor:
    """x [items, ...] after quantization, float64; dynamic ranges are per item."""
    if x_bits == 0:
        return x.double()
    top = 2**x_bits - 1
    xf = x.float()
    if x_scale is not None and x_zero_point is not None:
        s, z = x_scale.reshape(()), x_zero_point.reshape(()).float()
    else:
        shape = (-1,) + (1,) * (x.dim() - 1)
        lo = xf.flatten(1).amin(1).clamp_max(0).reshape(shape)
        hi = xf.flatten(1).amax(1).clamp_min(0).reshape(shape)
        s = (hi - lo) / top
        s = torch.where(s > 0, s, torch.ones_like(s))
        z = (-lo / s).round().clamp(0, top)
    q = ((xf / s).round() + z).clamp(0, top)
    return (q - z).double() * s.double()


def _adapter(a: Tensor, adapter_scale: Tensor | None) -> Tensor:
    a = a.double()
    return a if adapter_scale is None else a * adapter_scale.double()[:, None]


def linear_lowrank(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    a: Tensor | None = None,
    b: Tensor | None = None,
    adapter_scale: Tensor | None = None,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    x_bits: int = 0,
) -> Tensor:
    """x What^T + ((x A^T) * adapter_scale) B^T + bias."""
    k, n = x.shape[-1], weight.shape[0]
    rows = x.reshape(-1, k)
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], n)
    xh = _quantize_input(rows, x_scale, x_zero_point, x_bits)
    y = xh @ dequantize_packed(weight, scale, zero_point, bits, k).double().T
    if a is not None and b is not None:
        y = y + (xh @ _adapter(a, adapter_scale).T) @ b.double().T
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype).reshape(*x.shape[:-1], n)


def conv2d_lowrank(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    a: Tensor | None = None,
    b: Tensor | None = None,
    adapter_scale: Tensor | None = None,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    x_bits: int = 0,
) -> Tensor:
    """conv(x, What) + conv1x1(conv(x, A) * adapter_scale, B) + bias, torch's convolution in
    float64."""
    n, cin = weight.shape[0], x.shape[1] // groups
    k = cin * kernel_size[0] * kernel_size[1]
    xh = _quantize_input(x, x_scale, x_zero_point, x_bits) if x.shape[0] else x.double()
    shape = (cin, *kernel_size)
    what = dequantize_packed(weight, scale, zero_point, bits, k).double().reshape(n, *shape)
    y = F.conv2d(xh, what, None, stride, padding, dilation, groups)
    if a is not None and b is not None and a.shape[0]:
        u = F.conv2d(
            xh,
            _adapter(a, adapter_scale).reshape(-1, *shape),
            None,
            stride,
            padding,
            dilation,
            groups,
        )
        y = y + F.conv2d(u, b.double()[:, :, None, None], groups=groups)
    if bias is not None:
        y = y + bias.double()[:, None, None]
    return y.to(x.dtype)


def prepare_layer(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    channels: int,
    kernel_size: tuple[int, ...] = (),
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
    a: Tensor | None = None,
    b: Tensor | None = None,
    adapter_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Any]:
    """The arguments of linear_lowrank or conv2d_lowrank: nothing is prepared."""
    layer: dict[str, Any] = {
        "weight": codes,
        "scale": scale,
        "zero_point": zero_point,
        "bits": bits,
    }
    if kernel_size:
        layer |= {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        layer |= {"dilation": dilation, "groups": groups}
    return {**layer, "a": a, "b": b, "adapter_scale": adapter_scale, "bias": bias}


def run_layer(
    x: Tensor,
    layer: dict[str, Any],
    geometry: list[int],
    x_scale: float | None = None,
    x_zero_point: int = 0,
    x_bits: int = 0,
    x_halo: int = 0,
    add: Tensor | None = None,
    add_scale: float = 1.0,
    add_zero_point: int = 0,
    add_halo: int = 0,
    clamp_min: float = -math.inf,
    clamp_max: float = math.inf,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_halo: int = 0,
) -> Tensor:
    """Dequantize what is codes, run the layer in float64, add, clamp, quantize.

    Codes may differ by one from a kernel's: it rounds the same number at the end of float32 steps.
    """
    image = "kernel_size" in layer

    def real(t: Tensor, scale: float, zero_point: int, halo: int) -> Tensor:
        if t.dtype != torch.uint8:
            return t.double()
        return (_without_halo(t, halo) if image else t).double().sub(zero_point) * _f32(scale)

    if x.dtype == torch.uint8:
        xh = real(x, x_scale or 0.0, x_zero_point, x_halo)
    else:
        xh = x.float()
        if x_bits and x.numel():
            rows = xh if image else xh.reshape(-1, xh.shape[-1])
            scale = None if x_scale is None else torch.tensor([x_scale])
            xh = _quantize_input(rows, scale, torch.tensor([x_zero_point]), x_bits).reshape(x.shape)
    y = (conv2d_lowrank if image else linear_lowrank)(xh.double(), **layer)
    if add is not None:
        y = y + real(add, add_scale, add_zero_point, add_halo)
    y = y.clamp(clamp_min, clamp_max)
    if out_scale is None:
        return y.to(torch.float32 if x.dtype == torch.uint8 else x.dtype)
    codes = ((y / _f32(out_scale)).round() + out_zero_point).clamp(0, 255).to(torch.uint8)
    return _with_halo(codes, out_zero_point, out_halo) if image else codes


def _f32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
