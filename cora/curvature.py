"""What errors of one layer cost the network's output: predicted from gradients, without labels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import float_tensors, gradients, of_samples
from .calibration import Calibration

__all__ = ["curvature", "sensitivity"]

_WORK = 1e12  # multiply-adds that the curvature's forward passes may take
_known: weakref.WeakKeyDictionary[Calibration, dict[str, float]] = weakref.WeakKeyDictionary()


@torch.enable_grad()
def curvature(
    calibration: Calibration, errors: Mapping[str, Sequence[Tensor]], samples: int = 256
) -> dict[str, list[float]]:
    """Predicted divergence from the float model if one layer's weight were off by an error.

    To second order it is 1/2 E[<g, dW>^2] over samples, g the gradient of a random projection of the
    output whose covariance is the divergence's Hessian: sqrt(p) eps - p (sqrt(p) eps) for
    probabilities p and normal eps. Nothing is assumed of how errors at different positions relate.

    Args:
        errors: layer -> errors of its weight, each in the weight's shape.
        samples: backward passes, of one sample each; fewer of a large model.
    """
    samples = calibration.affordable(samples, _WORK, 16)
    names = list(errors)
    weights = [calibration.layers[name].weight for name in names]
    stacks = [torch.stack([e.flatten() for e in errors[name]]).float() for name in names]
    total = [torch.zeros(len(stack), dtype=torch.float64) for stack in stacks]
    generator = torch.Generator().manual_seed(calibration.seed)
    index = [(i, j) for i, batch in enumerate(calibration.batches) for j in range(len(batch))]
    drawn = torch.randperm(len(index), generator=generator)[:samples].tolist()
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for k in calibration.bar(drawn, "curvature"):
            batch, sample = index[k]
            output = calibration.run(calibration.batches[batch][sample : sample + 1])
            projected = _projection(
                output, calibration.teacher()[batch], calibration.logits, generator
            )
            found = gradients(projected, weights)
            if found is None:  # all layers count alike
                break
            for n, gradient in enumerate(found):
                if gradient is not None:
                    along = (stacks[n] @ gradient.flatten().float()).double().cpu()
                    total[n] += along.square()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {n: (t / (2 * len(drawn))).tolist() for n, t in zip(names, total, strict=True)}


def _projection(
    output: Any,
    teacher: Any,
    logits_of: Callable[[Any], Tensor | None],
    generator: torch.Generator,
) -> Tensor:
    """A random number whose gradient's covariance is the Hessian of a sample's divergence.

    Args:
        output: of the sample.
        teacher: output of the batch it is from, whose energy a regression's error is relative to.
    """

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.device)

    logits = logits_of(output)
    if logits is not None:
        flat = logits.float().reshape(-1, logits.shape[-1])
        p = flat.detach().softmax(-1)
        drawn = p.sqrt() * noise(p)
        drawn = drawn - p * drawn.sum(-1, keepdim=True)  # covariance diag(p) - p p^T
        finite = torch.where(flat.isfinite(), flat, torch.zeros_like(flat))
        return (finite * drawn).sum() / len(flat) ** 0.5
    parts = []
    for tensor, whole in of_samples(float_tensors(output), float_tensors(teacher)):
        energy = whole.float().square().mean().clamp(min=1e-12)
        parts.append(
            (tensor.float() * noise(tensor)).sum() * (2 / (energy * tensor.numel())).sqrt()
        )
    return torch.stack(parts).sum() / len(parts) ** 0.5


@torch.enable_grad()
def sensitivity(calibration: Calibration) -> dict[str, float]:
    """Mean squared gradient of the loss with respect to each layer's outputs.

    No labels: of classes they are drawn from the float model itself (so that this is its Fisher
    information), of a regression the output is projected on random signs.
    """
    if calibration in _known:
        return _known[calibration]
    total = dict.fromkeys(calibration.layers, 0.0)
    count = 0
    generator = torch.Generator().manual_seed(calibration.seed)

    def see(name: str, _x: Tensor, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            total[name] += float(gradient.double().square().sum()) / output[0].numel()

        if output.requires_grad:
            output.register_hook(add)

    weights = [layer.weight for layer in calibration.layers.values()]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with calibration.watch(calibration.layers, see):
            for part in calibration.bar(calibration.first(256), "sensitivity"):
                loss = _sampled_loss(calibration.run(part), calibration.logits, generator)
                if gradients(loss, weights) is None:  # all layers count alike
                    total, count = dict.fromkeys(calibration.layers, 1.0), 1
                    break
                count += len(part)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    _known[calibration] = {name: value / count for name, value in total.items()}
    return _known[calibration]


def _sampled_loss(
    output: Any, logits_of: Callable[[Any], Tensor | None], generator: torch.Generator
) -> Tensor:
    logits = logits_of(output)
    if logits is not None:
        flat = logits.float().reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)
        # Frames of a sample share its weight, as they do in the divergence.
        frames = flat.shape[0] / max(logits.shape[0], 1)
        labels = drawn[:, 0].to(flat.device)
        return F.cross_entropy(flat, labels, reduction="sum") / max(frames, 1.0) ** 0.5
    tensors = float_tensors(output)
    if not tensors:
        raise TypeError(f"model: output must hold float tensors, got {type(output).__name__}")
    losses = []
    for tensor in tensors:
        signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        energy = tensor.detach().square().mean().clamp(min=1e-12)
        losses.append((tensor * signs).sum() / (energy * tensor[0].numel()).sqrt())
    return torch.stack(losses).sum()
