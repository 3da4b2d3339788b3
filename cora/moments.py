"""A layer's input as rows of a matrix, and the sums of products of such rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .lowrank import FloatLayer, LayerShape

__all__ = [
    "add_products",
    "draw",
    "input_rows",
    "likeliest_ridge",
    "lowest",
    "output_energy",
    "regularized",
    "symmetric",
]


def _reach(layer: FloatLayer, size: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Along each dimension, what output position o sees at kernel position k of an input of `size`.

    Returns:
        index int64 [outputs, kernel], within the input, and bool: False where it sees a zero instead.
    """
    found = []
    for d, n in enumerate(size):
        kernel, stride, padding = layer.kernel_size[d], layer.stride[d], layer.padding
        tap = torch.arange(kernel) * layer.dilation[d]
        if layer.transposed:  # input i lands on output o = i * stride + tap - padding
            outputs = (n - 1) * stride - 2 * padding[d] + int(tap[-1]) + layer.output_padding[d] + 1
            index = torch.arange(outputs)[:, None] + padding[d] - tap
            inside = (index >= 0) & (index < n * stride) & (index % stride == 0)
            index = index.div(stride, rounding_mode="floor")
        else:
            left, right = layer._reversed_padding_repeated_twice[2 * (len(size) - 1 - d) :][:2]
            outputs = (n + left + right - int(tap[-1]) - 1) // stride + 1
            index = torch.arange(outputs)[:, None] * stride + tap - left
            inside = (index >= 0) & (index < n)
            if layer.padding_mode == "circular":
                index %= n
            elif layer.padding_mode == "reflect":
                index = (n - 1) - ((n - 1) - index.abs()).abs()
            if layer.padding_mode != "zeros":
                inside = torch.ones_like(inside)
        found.append((index.clamp(0, n - 1), inside))
    return found


def input_rows(
    layer: FloatLayer, x: Tensor, limit: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """What each output position of a layer sees, as rows that meet the rows of its weight matrix.

    Args:
        layer: a Linear or (transposed) convolution.
        x: its input.
        limit: keep about this many positions, drawn with `generator`; None keeps all.

    Returns:
        float32 [groups, positions, K].
    """
    x = x.detach().float()
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[draw(len(rows), limit, generator)].unsqueeze(0)
    dims = len(layer.kernel_size)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    reach = _reach(layer, x.shape[2:])
    sizes = (len(x), *(len(index) for index, _ in reach))
    image, *place = torch.unravel_index(draw(math.prod(sizes), limit, generator), sizes)
    # Only what the drawn positions see is read: x is neither padded nor unfolded.
    where, inside = [image.reshape(-1, *[1] * dims)], torch.ones(1, dtype=torch.bool)
    for d, (index, valid) in enumerate(reach):
        shape = [-1 if axis in (0, 1 + d) else 1 for axis in range(1 + dims)]
        shape[0] = len(image)
        where.append(index[place[d]].reshape(shape))
        inside = inside & valid[place[d]].reshape(shape)
    rows = x.movedim(1, -1)[tuple(where)]  # [positions, *kernel, Cin]
    if not inside.all():
        rows.masked_fill_(~inside.unsqueeze(-1).to(rows.device), 0)
    by_group = rows.movedim(-1, 1).reshape(len(image), layer.groups, -1)
    return by_group.contiguous().transpose(0, 1)  # a view of depthwise rows is slow to multiply


def draw(count: int, limit: int | None, generator: torch.Generator | None) -> Tensor:
    if limit is None or count <= limit:
        return torch.arange(count)
    if count <= 4 * limit:
        return torch.randperm(count, generator=generator)[:limit]
    return torch.randint(count, (limit,), generator=generator)


_BLOCKS = 8  # of rows: with 8, the lower triangle takes 9/16 of the square's products


def _by_blocks(total: Tensor) -> bool:
    return len(total) == 1 and total.shape[1] >= 256


def add_products(total: Tensor, rows: Tensor, weight: float) -> None:
    """total += weight * rows^T rows, at least its lower triangle.

    Args:
        total: [groups, K, K].
        rows: [groups, positions, K].
    """
    if not _by_blocks(total):
        total.baddbmm_(rows.transpose(1, 2), rows, alpha=weight)
        return
    columns = total.shape[1]
    step = -(-columns // _BLOCKS)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        left, right = rows[0, :, start:end].T, rows[0, :, :end]
        total[0, start:end, :end].addmm_(left, right, alpha=weight)


def symmetric(total: Tensor) -> Tensor:
    """What `add_products` made, whole; in its place."""
    if _by_blocks(total):
        matrix, step = total[0], -(-total.shape[1] // _BLOCKS)
        for start in range(0, len(matrix), step):
            end = start + step
            block = matrix[start:end, start:end]
            block.copy_(block.tril() + block.tril(-1).T)
            matrix[:start, start:end] = matrix[start:end, :start].T
    return total


def output_energy(matrix: Tensor, shape: LayerShape, moment: Tensor) -> float:
    """Mean energy of a weight's output on the calibration inputs: trace(W Sxx W^T), at least tiny."""
    grouped = matrix.reshape(shape.groups, -1, shape.columns)
    energy = float(((grouped @ moment) * grouped).sum(dtype=torch.float64))
    return max(energy, 0.0) or 1e-30


def regularized(first: Tensor, second: Tensor, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean second moment of an input that holds for samples that were not seen, positive definite.

    Args:
        first, second: sums over two halves of the samples, [groups, K, K]; both are overwritten.
        samples: of each half.

    Returns:
        float32 [groups, K, K], per sample; what was added to its diagonals, [groups].
    """
    means = [half / max(count, 1) for half, count in zip((first, second), samples, strict=True)]
    ridge = likeliest_ridge(*means)
    moment = first.add_(second).div_(sum(samples))
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    added = ridge * diagonal.mean(-1)
    added = torch.where(added > 0, added, torch.ones_like(added))
    diagonal.add_(added[:, None])
    return moment, added


_RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_EXACT = 1024  # columns up to which a trace is summed, not estimated
_PROBES = 64


def likeliest_ridge(first: Tensor, second: Tensor) -> float:
    """What to add to a second moment's diagonal, as a share of its mean, for inputs that were not seen.

    Of few samples a moment knows less than it says: directions that they happen to miss look free of
    charge. The ridge is the one under which a normal distribution with the moment of one half of the
    samples is the likeliest to give the other half.

    Args:
        first, second: moments of the halves [groups, K, K], float32, positive semidefinite, of one scale.

    Returns:
        One of a few values from 0.001 to 3, for all groups.
    """
    mean = first.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    a, b = first / mean[:, None, None], second / mean[:, None, None]
    trace = _trace_of_quotient(b)

    def surprise(ridge: float) -> float:
        ridged = a.clone()
        ridged.diagonal(dim1=-2, dim2=-1).add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(ridged)
        if failed.any():
            return math.inf
        logdet = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(dtype=torch.float64)
        return float(trace(lower) + logdet)

    return lowest(surprise, _RIDGES, 0.01)[0]


def _trace_of_quotient(b: Tensor) -> Callable[[Tensor], Tensor]:
    """From the Cholesky factor of A [groups, K, K] to the trace of A^-1 b over all groups: float64.

    Source of the estimate: Hutchinson 1990.
    """
    columns = b.shape[-1]
    if columns <= _EXACT:
        return lambda lower: (torch.cholesky_inverse(lower) * b).sum(dtype=torch.float64)
    # The same signs z for every A: what the mean of z^T A^-1 b z misses, it misses of all.
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (columns, _PROBES), generator=generator).to(b) * 2 - 1
    seen = b @ signs
    signs = signs.expand(seen.shape)
    return lambda lower: (
        (torch.cholesky_solve(signs, lower) * seen).sum(dtype=torch.float64) / _PROBES
    )


def lowest(
    cost: Callable[[float], float], grid: Sequence[float], start: float
) -> tuple[float, float]:
    """The value of a grid at which a cost with one minimum is lowest, and that cost; sought from `start`."""
    known = functools.cache(cost)
    best = grid.index(start)
    for step in (1, -1):
        while 0 <= best + step < len(grid) and known(grid[best + step]) < known(grid[best]):
            best += step
    return grid[best], known(grid[best])
