"""The last step: scales, biases and adapters of packed layers, tuned together to the float model's outputs.

Codes stay as they are. What is tuned is small (a few numbers a channel) and sees the whole network, so a
hundred gradient steps on unlabelled samples find what no layer by itself can: how its errors meet the others'.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import ops
from .batches import gradients
from .evaluation import Evaluator, is_better
from .lowrank import FloatLayer, fold, quantize_adapter, rounded_factors
from .modules import QuantLayer
from .quantizer import FLOAT16_MAX, FLOAT16_MIN_NORMAL

__all__ = ["TuneConfig", "TuneResult", "tune"]

_CHECKS = 12  # looks at the held-out samples
_PATIENCE = 4  # looks without a lower held-out loss, then tuning ends
_ALARM = 1.5  # times the loss at the start: the steps are too large


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """How scales, biases and adapters are tuned.

    Args:
        iterations: gradient steps; 0 leaves them as they were fitted.
        batch_size: samples a step.
        learning_rate: of Adam, relative to the size of what is tuned; falls to 0 along a cosine.

    Raises:
        ValueError: a field out of range.
    """

    iterations: int = 120
    batch_size: int = 32
    learning_rate: float = 0.002

    def __post_init__(self) -> None:
        for name, low in (("iterations", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"TuneConfig: {name} must be an integer >= {low}, got {value!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"TuneConfig: learning_rate must be > 0, got {self.learning_rate!r}")


@dataclass(slots=True)
class TuneResult:
    """What tuning did.

    Args:
        before, after: loss on held-out samples; equal where nothing was better by more than its
            standard error.
        train: mean loss of the last steps on their own samples; far below `after` it tells of
            overfitting.
        step: of the best iterate, 0 for the start.
        history: one entry a step or check: step, kind, loss.
        alarm: the held-out loss rose well above its start: the learning rate is too high.
        interrupted: Ctrl-C ended it; the best iterate so far is kept.
    """

    before: float = math.nan
    after: float = math.nan
    train: float = math.nan
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    alarm: bool = False
    interrupted: bool = False


class _Layer:
    """What is tuned of one packed layer, and the weight it makes."""

    def __init__(self, packed: QuantLayer, output: float) -> None:
        self.packed = packed
        p = packed.packed_weight()
        codes = ops.unpack_bits(p.codes, p.qparams.bits, packed.shape.columns).float()
        run = packed.shape.columns // packed.scale.shape[1]
        grouped = codes.reshape(len(codes), -1, run)
        self.steps = grouped - packed.zero_point[:, :, None].float()
        self.log_scale = packed.scale.log().requires_grad_()
        self.rates: list[tuple[Tensor, float]] = [(self.log_scale, 1.0)]
        self.bias = None if packed.bias is None else packed.bias.clone().requires_grad_()
        if self.bias is not None:
            self.rates.append((self.bias, output))
        self.factors: tuple[Tensor, Tensor] | None = None
        if packed.rank:
            a, b = p.adapter.a.float().clone(), p.adapter.b.float().clone()
            if p.adapter.scale is not None:
                root = p.adapter.scale.sqrt()
                a = a * root[:, None]
                b = (
                    b.reshape(packed.shape.groups, -1, packed.rank)
                    * root.reshape(packed.shape.groups, 1, -1)
                ).reshape(b.shape)
            self.factors = a.requires_grad_(), b.requires_grad_()
            for factor in self.factors:
                size = float(factor.detach().square().mean().sqrt())
                self.rates.append((factor, max(size, 1e-12)))

    def scale(self) -> Tensor:
        """As it is stored; the gradient passes through the rounding."""
        scale = self.log_scale.exp()
        if self.packed.scale_dtype != torch.float16:
            return scale
        stored = scale.detach().clamp(FLOAT16_MIN_NORMAL, FLOAT16_MAX).half().float()
        return scale + (stored - scale).detach()

    def weight(self) -> Tensor:
        packed = self.packed
        matrix = (self.scale()[:, :, None] * self.steps).reshape(packed.shape.rows, -1)
        if self.factors is not None:
            groups, rank = packed.shape.groups, packed.rank
            exact = self.factors
            stored = rounded_factors(
                exact[0].detach(), exact[1].detach(), packed.adapter_bits, groups
            )
            a, b = (e + (s - e).detach() for e, s in zip(exact, stored, strict=True))
            product = b.reshape(groups, -1, rank) @ a.reshape(groups, rank, -1)
            matrix = matrix + product.reshape(matrix.shape)
        transposed = getattr(packed, "transposed", False)
        return fold(matrix, packed.weight_shape, transposed, packed.shape.groups)

    def store(self) -> None:
        """Put what was tuned into the packed layer."""
        packed = self.packed
        packed.scale = self.scale().detach()
        if self.bias is not None:
            packed.bias = self.bias.detach().clone()
        if self.factors is not None:
            a, b = (factor.detach() for factor in self.factors)
            adapter = quantize_adapter(a, b, packed.adapter_bits, packed.shape.groups)
            packed.adapter_a, packed.adapter_b = adapter.a, adapter.b
            packed.adapter_scale = adapter.scale
        packed.prepare()


@contextmanager
def _with_biases(
    float_layers: Mapping[str, FloatLayer], layers: Mapping[str, _Layer]
) -> Iterator[None]:
    """Float layers without a bias get one of zeros, so that the packed layer's can take its place."""
    without = [
        n for n, la in layers.items() if la.bias is not None and float_layers[n].bias is None
    ]
    for name in without:
        bias = layers[name].bias
        assert bias is not None
        float_layers[name].bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    try:
        yield
    finally:
        for name in without:
            float_layers[name].bias = None


@torch.enable_grad()  # the caller may have turned gradients off
def tune(
    layers: Mapping[str, QuantLayer],
    evaluator: Evaluator,
    config: TuneConfig,
    ranges: MutableMapping[str, tuple[Tensor, Tensor]] | None = None,
    progress: bool = True,
) -> TuneResult:
    """Tune packed layers in place; the iterate that is best on held-out samples is kept.

    Args:
        layers: name -> packed layer of the evaluator's float layer of that name.
        evaluator: the float model and its samples.
        ranges: static quantizers of the layers' inputs that `evaluator.simulate` reads, to be tuned
            too; None leaves them.
    """
    result = TuneResult()
    if not config.iterations:
        return result
    calibration = evaluator.calibration
    tuned: dict[str, _Layer] = {}
    for name, packed in layers.items():
        # Adam's steps are of one size: a bias moves in units of its layer's typical output.
        bias = packed.bias
        size = 1.0 if bias is None else float(calibration.output_size(name))
        tuned[name] = _Layer(packed, size)
    log_x = {
        name: scale.log().requires_grad_()
        for name, (scale, _) in (ranges or {}).items()
        if name in layers
    }
    rates = [pair for layer in tuned.values() for pair in layer.rates]
    rates += [(value, 1.0) for value in log_x.values()]
    base = config.learning_rate
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": base * rate, "base": base * rate} for p, rate in rates],
        betas=(0.9, 0.99),
    )
    values = [p for p, _ in rates]

    def parameters() -> dict[str, Tensor]:
        if ranges is not None:
            for name, value in log_x.items():
                ranges[name] = value.exp(), ranges[name][1]
        found = evaluator.weights({name: layer.weight() for name, layer in tuned.items()})
        for name, layer in tuned.items():
            if layer.bias is not None:
                key = f"{name}.bias" if name else "bias"
                found[key] = layer.bias.to(calibration.layers[name].weight.dtype)
        return found

    best = [p.detach().clone() for p in values]
    bar = tqdm(total=config.iterations, desc="tuning", disable=not progress, leave=False)
    check = max(1, config.iterations // _CHECKS)
    evaluator.resize(config.batch_size)
    recent: list[float] = []
    waited = 0
    with _with_biases(calibration.layers, tuned):
        try:
            with torch.no_grad():
                start = evaluator.score(parameters())
            lowest, least = start, float(start.mean())
            result.before = result.after = float(start.mean())
            for step in range(1, config.iterations + 1):
                rate = 0.5 * (1 + math.cos(math.pi * (step - 1) / config.iterations))
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * rate
                loss = evaluator.losses(parameters(), *evaluator.next_batch()).mean()
                found = gradients(loss, values)
                if found is None:
                    warnings.warn(
                        "tune: the model has no gradients (it turns them off, or changes in place what they "
                        "need), so nothing was tuned",
                        stacklevel=3,
                    )
                    break
                for value, gradient in zip(values, found, strict=True):
                    value.grad = None if gradient is None else torch.nan_to_num(gradient)
                optimizer.step()
                recent = [*recent[-19:], float(loss.detach())]
                result.history.append({"step": step, "kind": "gradient", "loss": recent[-1]})
                bar.update()
                if step % check == 0 or step == config.iterations:
                    with torch.no_grad():
                        losses = evaluator.score(parameters())
                    held = float(losses.mean())
                    result.history.append({"step": step, "kind": "held out", "loss": held})
                    waited = 0 if held < least else waited + 1
                    least = min(held, least)
                    result.alarm |= held > _ALARM * result.before
                    if held < float(lowest.mean()) and is_better(start - losses):
                        lowest, result.after, result.step = losses, held, step
                        best = [p.detach().clone() for p in values]
                    bar.set_postfix_str(f"held out {held:.4f} (start {result.before:.4f})")
                    if waited == _PATIENCE:
                        break
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            bar.close()
        result.train = sum(recent) / max(len(recent), 1)
        with torch.no_grad():
            for value, kept in zip(values, best, strict=True):
                value.copy_(kept)
            parameters()  # ranges are the best iterate's again
    if result.step:
        for layer in tuned.values():
            layer.store()
        for name in log_x:
            assert ranges is not None
            layers[name].set_activation_range(ranges[name][0].detach(), ranges[name][1])
    if ranges is not None:
        for name in log_x:
            ranges[name] = ranges[name][0].detach(), ranges[name][1]
    return result
