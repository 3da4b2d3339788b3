"""What the calibration data tell of a float model: its outputs, second moments of layers' inputs, activations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .activation_ranges import ActivationRange, activation_qparams
from .batches import (
    Batch,
    divergence,
    float_tensors,
    in_parts,
    output_logits,
    required_inputs,
)
from .fold import FoldedBatchNorm, fold_batch_norms, fold_pairs, same_outputs
from .lowrank import FloatLayer, LayerShape, unfold
from .modules import QUANT_LAYERS, QuantLayer, copied
from .moments import (
    add_products,
    draw,
    input_rows,
    output_energy,
    regularized,
    symmetric,
)
from .restructure import hides_layers, restructure

__all__ = [
    "Calibration",
    "quantizable_layers",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_RANGE_SAMPLES = 65536  # values of a layer's input kept to choose its range from
_MOMENT_WORK = 2.5e10  # multiply-adds of a layer's second moment beyond the fewest positions


def quantizable_layers(model: nn.Module) -> tuple[dict[str, FloatLayer], dict[str, str]]:
    """The layers that can be quantized, and why other modules with weights stay float.

    Only the exact types in `QUANT_LAYERS` count: a subclass may use its weight in its own way.

    Returns:
        name -> layer, and name -> reason, both in the order of `model.named_modules()`.
    """
    layers: dict[str, FloatLayer] = {}
    kept: dict[str, str] = {}
    inside_attention: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside_attention):
            continue
        if isinstance(module, nn.MultiheadAttention):  # see `cora.attention`
            inside_attention.append(f"{name}." if name else "")
            kept[name] = f"{type(module).__name__} reads its weights itself"
        elif type(module) in QUANT_LAYERS and (module._forward_hooks or module._forward_pre_hooks):
            kept[name] = f"{type(module).__name__} has a forward hook, which a packed layer has not"
        elif type(module) in QUANT_LAYERS:
            layers[name] = module
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            kept[name] = f"{type(module).__name__}: recurrent weights stay float"
        elif isinstance(module, tuple(QUANT_LAYERS)):
            kept[name] = (
                f"{type(module).__name__} is a subclass that may use its weight in its own way"
            )
        elif any(True for _ in module.parameters(recurse=False)):
            kept[name] = f"{type(module).__name__}: not a weight matrix of a kind that is quantized"
    return layers, kept


def _same_parameters(own: FloatLayer, other: FloatLayer) -> bool:
    """Whether two layers have equal weights and biases, of one type and device."""
    for a, b in ((own.weight, other.weight), (own.bias, other.bias)):
        if a is None and b is None:
            continue
        if a is None or b is None or (a.dtype, a.device) != (b.dtype, b.device):
            return False
        if not torch.equal(a, b):
            return False
    return True


# --- The calibration set -------------------------------------------------------------------------


class Calibration:
    """A float model with its calibration batches, and what they tell, computed once and kept.

    Pass it to `cora.quantize` in place of the batches to quantize one model several times.

    Args:
        model: the float model; a copy in eval mode is kept, the model itself is not touched.
        batches: iterable of batches (see `Batch`); a single tensor or dict is one batch.
        samples: use at most so many samples.
        seed: of everything that is drawn: positions, sampled labels.
        memory_limit: bytes of second moments held at once; beyond it they are made in several passes.
        logits: finds the logits in the model's output; see `output_logits`.
        progress: show progress bars.
        fold_bn: fold batch norms into the layers before them (see `cora.fold`), so that they are
            quantized with the weights.

    Raises:
        ValueError: no samples, non-finite values, or no layer that can be quantized.
        TypeError: a batch without tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        samples: int = 1600,
        seed: int = 0,
        memory_limit: int = 2 << 30,
        logits: Callable[[Any], Tensor | None] = output_logits,
        progress: bool = False,
        fold_bn: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"model: expected the module that {type(model).__name__} holds, pass model.module"
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(
                "model: expected the Python module that the ScriptModule was made of: its layers can be replaced"
            )
        whole = copied(model).requires_grad_(False)
        self.restructured = hides_layers(whole)
        self.model = restructure(copied(whole)) if self.restructured else whole
        self.layers, self.kept_float = quantizable_layers(self.model)
        if not self.layers:
            kinds = ", ".join(kind.__name__ for kind in QUANT_LAYERS)
            if any(isinstance(module, QuantLayer) for module in whole.modules()):
                raise ValueError("model: expected a float model, got one that is packed already")
            why = "".join(
                f"; {name or 'it'}: {text}" for name, text in [*self.kept_float.items()][:3]
            )
            raise ValueError(f"model: expected at least one layer of {kinds}, found none{why}")
        for name, layer in self.layers.items():
            if layer.weight.dtype not in _FLOATS:
                raise ValueError(
                    f"{name}: weight must be float32, float16 or bfloat16, got "
                    f"{str(layer.weight.dtype).removeprefix('torch.')}; try model.float()"
                )
            if not torch.isfinite(layer.weight).all():
                raise ValueError(f"{name}: weight must be finite, got NaN or inf")
        self.seed, self.logits, self.progress = seed, logits, progress
        self.memory_limit = memory_limit
        self.device = next(self.model.parameters()).device
        self.batches = self._take(batches, samples)
        if self.restructured and not self._gives_what(whole):
            self.restructured, self.model = False, whole
            self.layers, self.kept_float = quantizable_layers(whole)
        self.fold_bn = fold_bn
        self.folded: dict[str, str] = {}  # layer -> the batch norm now in it
        if fold_bn:
            self.folded, kept = fold_batch_norms(self.model, lambda _: self.run(self.batches[0]))
            self.kept_float.update(kept)
            for norm in self.folded.values():
                self.kept_float.pop(norm, None)
        self._check_samples()
        self._teacher: list[Any] | None = None
        self._moments: dict[str, Tensor] = {}
        self._ridges: dict[str, Tensor] = {}  # within the moments' diagonals
        self._seen: dict[str, float] | None = None
        self._activations: dict[tuple[str, str], tuple[Tensor, float, float]] | None = None

    def _take(self, batches: Iterable[Any], samples: int) -> list[Batch]:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        required = required_inputs(self.model)
        if isinstance(batches, Tensor | Mapping):
            batches = [batches]
        if isinstance(batches, str) or not isinstance(batches, Iterable):
            raise TypeError(
                f"calibration: expected an iterable of batches, got {type(batches).__name__}"
            )
        taken: list[Batch] = []
        left = samples
        for index, item in enumerate(batches):
            batch = item if isinstance(item, Batch) else Batch(item, required)
            for tensor in batch.tensors():
                # -inf masks attention.
                if tensor.is_floating_point() and not (tensor < torch.inf).all():
                    raise ValueError(f"calibration: batch {index} must be finite, got NaN or inf")
            if len(batch) == 0:
                continue
            batch = (batch if len(batch) <= left else batch[:left]).to(self.device)
            taken.append(batch)
            left -= len(batch)
            if left <= 0:
                break
        if not taken:
            raise ValueError("calibration: expected at least one sample, got none")
        return taken

    def _gives_what(self, whole: nn.Module) -> bool:
        """Whether the model gives another one's output: its own code may read a restructured weight."""
        with torch.no_grad():
            try:
                found = self.batches[0].run(self.model)
            except Exception:  # what is wrong with the batch the whole model will say
                return False
            return same_outputs(self.batches[0].run(whole), found)

    @property
    def samples(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless `model` has the layers and weights that this was made of."""
        if self.restructured or self.folded:
            model = copied(model)
        if self.restructured:
            model = restructure(model)
        if self.folded:
            here = dict(model.named_modules())
            pairs = {a: b for a, b in self.folded.items() if {a, b} <= here.keys()}
            # The kept copy itself is folded already.
            pairs = {a: b for a, b in pairs.items() if not isinstance(here[b], FoldedBatchNorm)}
            fold_pairs(model, pairs)
        layers, _ = quantizable_layers(model)
        for name in {**self.layers, **layers}:
            own, other = (found.get(name) for found in (self.layers, layers))
            if own is None or other is None or not _same_parameters(own, other):
                raise ValueError(
                    f"calibration: it is of another model: layer {name!r} differs; make a new "
                    "Calibration after changing a model"
                )

    def _check_samples(self) -> None:
        """Warn of a model whose output on a sample depends on the others: they are drawn one by one."""
        pair = self.batches[0][:2]
        if len(pair) < 2:
            return
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = []
            for part in (pair, pair[:1]):
                torch.manual_seed(0)
                outputs.append(float_tensors(self.run(part)))
        for both, alone in zip(*outputs, strict=False):
            sized = both.dim() and alone.dim() and (len(both), len(alone)) == (2, 1)
            if sized and not same_outputs(both[:1], alone):
                warnings.warn(
                    "calibration: the model's output on the first sample changes with the second one: the "
                    "first dimension of every input must be that of independent samples (batch_first=True)",
                    stacklevel=3,
                )
                return

    def bar(self, items: Sequence[Any], title: str) -> Iterable[Any]:
        return tqdm(items, desc=title, leave=False, disable=not self.progress)

    def teacher(self) -> list[Any]:
        """The float model's output on every batch."""
        if self._teacher is None:
            self._pass((), lambda *_: None, "float outputs", self.batches)
        return self._teacher or []

    def _pass(
        self,
        names: Iterable[str],
        see: Callable[[int, str, Tensor, Tensor], None],
        title: str,
        batches: Sequence[Batch],
    ) -> None:
        """One run over batches: see(batch, layer, input, output) whenever one of the layers runs.

        The first pass's outputs on the calibration batches are kept as the teacher's.
        """
        outputs: list[Any] = []
        wanted = self._teacher is None and batches is self.batches
        index = 0
        with torch.no_grad(), self.watch(names, lambda *run: see(index, *run)):
            for index, batch in enumerate(  # noqa: B007  # the hook reads it
                self.bar(batches, title)
            ):
                output = self.run(batch)
                if wanted:
                    outputs.append(output)
        for index, output in enumerate(outputs):
            if any(tensor.isnan().any() for tensor in float_tensors(output)):
                raise ValueError(f"model: output on calibration batch {index} is NaN")
        if wanted:
            self._teacher = outputs

    def divergence(self, candidate: nn.Module) -> float:
        """Mean divergence of a model from the float one over the samples (see `divergence`)."""
        total = 0.0
        with torch.no_grad():
            for batch, teacher in zip(self.batches, self.teacher(), strict=True):
                output = batch.run(candidate)
                total += float(divergence(output, teacher, self.logits)) * len(batch)
        return total / self.samples

    def run(self, batch: Batch) -> Any:
        """The float model's output on a batch."""
        try:
            return batch.run(self.model)
        except Exception as error:  # the user's own code may raise anything
            tensors = ", ".join(
                f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in batch.tensors()
            )
            raise ValueError(
                f"calibration: the model does not run on a batch of {tensors} (its first dimension is that of "
                f"samples): {error}"
            ) from error

    @contextmanager
    def watch(
        self, names: Iterable[str], see: Callable[[str, Tensor, Tensor], None]
    ) -> Iterator[None]:
        """Call see(name, input, output) whenever one of the named layers runs."""
        handles = [
            self.layers[name].register_forward_hook(
                lambda _module, args, kwargs, output, name=name: see(
                    name, (*args, *kwargs.values())[0], output
                ),
                with_kwargs=True,
            )
            for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def moment(self, name: str) -> Tensor:
        """Second moment of a layer's input, summed over the positions of a sample: float32 [groups, K, K].

        Positive definite, see `moments.regularized`.
        """
        if name not in self._moments:
            self._collect_moments(self._chunk(name))
        return self._moments[name]

    def _moment_bytes(self, name: str) -> int:
        shape = LayerShape.of(self.layers[name])
        return 2 * 4 * shape.groups * shape.columns**2  # of each half of the samples

    def _chunk(self, name: str) -> list[str]:
        """`name` and the layers after it whose moments fit in memory together."""
        names = list(self.layers)
        chunk: list[str] = []
        size = 0
        for other in names[names.index(name) :]:
            size += self._moment_bytes(other)
            if chunk and size > self.memory_limit:
                break
            chunk.append(other)
        return chunk

    def matrix(self, name: str) -> Tensor:
        """A layer's float weight as a matrix, float32 [N, K] contiguous."""
        layer = self.layers[name]
        transposed, groups = getattr(layer, "transposed", False), getattr(layer, "groups", 1)
        return unfold(layer.weight.detach().float(), transposed, groups).contiguous()

    def seen(self, name: str) -> float:
        """Positions of a layer's output in the first sample; 0 if it never runs."""
        return self._first_run().get(name, 0.0)

    def _first_run(self) -> dict[str, float]:
        """Positions in the first sample of the layers that run, in the order in which they first do."""
        if self._seen is None:
            found: dict[str, float] = {}

            def see(name: str, _x: Tensor, output: Tensor) -> None:
                rows = LayerShape.of(self.layers[name]).rows
                found[name] = found.get(name, 0.0) + output.numel() / rows

            with torch.no_grad(), self.watch(self.layers, see):
                self.run(self.batches[0][:1])
            self._seen = found
        return self._seen

    def first(self, samples: int) -> list[Batch]:
        """The batches of the first samples, the last one cut where it holds more."""
        found: list[Batch] = []
        for batch in self.batches:
            if samples <= 0:
                break
            found.append(batch[:samples])
            samples -= len(found[-1])
        return found

    def affordable(self, samples: int, work: float, least: int) -> int:
        """So many samples as a forward pass through the layers runs on `work` multiply-adds.

        Args:
            samples: at most.
            least: even if they take more.
        """
        each = sum(
            self.seen(name) * shape.rows * shape.columns
            for name, shape in ((n, LayerShape.of(layer)) for n, layer in self.layers.items())
        )
        return min(samples, max(least, int(work / max(each, 1.0))))

    def energy(self, name: str, matrix: Tensor) -> float:
        """Mean energy of a layer's output on these samples with a weight [N, K], at least tiny."""
        shape = LayerShape.of(self.layers[name])
        energy = output_energy(matrix, shape, self.moment(name))
        squares = matrix.square().reshape(shape.groups, -1).sum(1)
        energy -= float(self._ridges[name].to(squares.device) @ squares)
        return max(energy, 1e-30)

    def output_size(self, name: str) -> float:
        """Root mean square of a layer's output (without its bias) over positions and channels."""
        matrix, shape = self.matrix(name), LayerShape.of(self.layers[name])
        return (self.energy(name, matrix) / (shape.rows * max(self.seen(name), 1.0))) ** 0.5

    @property
    def order(self) -> list[str]:
        """The layers' names in the order in which they first run; those that never run come last."""
        return list(dict.fromkeys([*self._first_run(), *self.layers]))

    def positions(self, name: str) -> int:
        """Positions of a layer's input that are drawn for its second moment, over all samples."""
        shape = LayerShape.of(self.layers[name])
        # A depthwise layer has many small moments.
        least = 16384 if shape.groups == 1 else 4096
        affordable = int(_MOMENT_WORK / (shape.groups * shape.columns**2))
        return max(least, 4 * shape.columns, min(4 * least, affordable))

    def _collect_moments(self, names: list[str]) -> None:
        self._moments = {}
        sums: dict[str, Tensor] = {}
        limits, generators = {}, {}
        # What one half of the samples tells is tried on the other.
        parts = in_parts(self.batches)
        for name in names:
            limits[name] = -(-self.positions(name) // len(parts))
            # A layer's own generator: its moment does not depend on which others share the pass.
            generators[name] = torch.Generator().manual_seed(self.seed)

        def see(index: int, name: str, x: Tensor, output: Tensor) -> None:
            layer = self.layers[name]
            rows = input_rows(layer, x, limits[name], generators[name])
            positions = output.numel() // LayerShape.of(layer).rows
            if name not in sums:
                sums[name] = rows.new_zeros(2, len(rows), rows.shape[2], rows.shape[2])
            add_products(sums[name][index % 2], rows, positions / max(rows.shape[1], 1))

        if parts is not self.batches:
            self.teacher()  # which tells of outputs that are NaN
        self._pass(names, see, "second moments", parts)
        samples = [sum(map(len, parts[half::2])) for half in range(2)]
        for name in names:
            shape = LayerShape.of(self.layers[name])
            if name in sums:
                first, second = (symmetric(half) for half in sums.pop(name))
                if not (first.isfinite().all() and second.isfinite().all()):
                    raise ValueError(
                        f"model: the inputs of layer {name!r} are too large to be squared"
                    )
                self._moments[name], self._ridges[name] = regularized(first, second, samples)
            else:  # the layer never ran on the calibration data
                eye = torch.eye(shape.columns, dtype=torch.float32)
                self._moments[name] = eye.repeat(shape.groups, 1, 1)
                self._ridges[name] = torch.ones(shape.groups, dtype=torch.float32)

    def activation_qparams(
        self,
        bits: int,
        method: ActivationRange = "mse",
        side: Literal["input", "output"] = "input",
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Static scale and zero-point of each layer's input (or output).

        Args:
            bits: width of a code.
            method: "minmax", "percentile" (the central 99.98 %) or "mse".
        """
        if self._activations is None:
            self._activations = self._collect_activations()
        return {
            name: activation_qparams(*self._activations[name, side], bits, method)
            for name in self.layers
        }

    def _collect_activations(self) -> dict[tuple[str, str], tuple[Tensor, float, float]]:
        """Sampled values and extremes of each layer's input and output."""
        kept: dict[tuple[str, str], list[Tensor]] = {}
        ends: dict[tuple[str, str], tuple[float, float]] = {}
        generators: dict[tuple[str, str], torch.Generator] = {}
        limit = -(-_RANGE_SAMPLES // len(self.batches))

        def see(_index: int, name: str, x: Tensor, output: Tensor) -> None:
            for side, tensor in (("input", x), ("output", output)):
                key, values = (name, side), tensor.detach().float().reshape(-1)
                low, high = ends.get(key, (math.inf, -math.inf))
                ends[key] = min(low, float(values.min())), max(high, float(values.max()))
                # Each its own generator: layers that read one tensor choose one range for it.
                if key not in generators:
                    generators[key] = torch.Generator().manual_seed(self.seed)
                kept.setdefault(key, []).append(values[draw(len(values), limit, generators[key])])

        self._pass(self.layers, see, "activation ranges", self.batches)
        return {
            (name, side): (torch.cat(kept[name, side]), *ends[name, side])
            if (name, side) in kept
            else (torch.zeros(1, dtype=torch.float32), 0.0, 0.0)
            for name in self.layers
            for side in ("input", "output")
        }
