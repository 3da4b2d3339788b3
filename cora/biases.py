"""Biases of packed layers, shifted so that their outputs keep their means."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .lowrank import FloatLayer
from .modules import QuantLayer

__all__ = ["correct_biases"]


def correct_biases(
    qmodel: nn.Module, layers: Mapping[str, QuantLayer], calibration: Calibration
) -> bool:
    """Shift the biases of packed layers, in place, so that output channels keep their float means.

    Means are compared batch by batch on the same inputs; a layer sees what the corrected layers before
    it give. The shifts are kept if they bring the model closer to the float one, and taken back if not.

    Returns:
        Whether they were kept.

    Source: Nagel et al. 2019, arXiv 1906.04721, sec. 4.2.
    """
    expected: dict[str, list[Tensor]] = {}
    shifts: dict[str, list[Tensor]] = {name: [] for name in layers}

    def mean(name: str, output: Tensor) -> Tensor:
        channel = _channel(calibration.layers[name], output)
        return output.float().mean([d for d in range(output.dim()) if d != channel])

    def see(name: str, _x: Tensor, output: Tensor) -> None:
        expected.setdefault(name, []).append(mean(name, output))

    def correct(name: str, output: Tensor) -> Tensor | None:
        if not expected.get(name):
            return None
        shift = expected[name].pop(0) - mean(name, output)
        shifts[name].append(shift)
        shape = [1] * output.dim()
        shape[_channel(calibration.layers[name], output)] = -1
        return output + shift.reshape(shape).to(output.dtype)

    before = calibration.divergence(qmodel)
    handles = [
        layer.register_forward_hook(lambda _m, _a, output, name=name: correct(name, output))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            for batch in calibration.bar(calibration.batches, "bias correction"):
                expected.clear()
                with calibration.watch(layers, see):
                    calibration.run(batch)
                batch.run(qmodel)
    finally:
        for handle in handles:
            handle.remove()
    biases = {name: layer.bias for name, layer in layers.items()}
    for name, layer in layers.items():
        if shifts[name]:
            shift = torch.stack(shifts[name]).mean(0)
            layer.set_bias(shift if layer.bias is None else layer.bias + shift)
    if calibration.divergence(qmodel) < before:
        return True
    for name, layer in layers.items():
        layer.set_bias(biases[name])
    return False


def _channel(layer: FloatLayer, output: Tensor) -> int:
    """The dimension of a layer's output that holds its channels."""
    return output.dim() - (1 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 1)
