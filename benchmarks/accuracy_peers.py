"""Other post-training quantizers on the same float weights and calibration images as cora's.

    for peer in peers():
        if peer.applies(model) and 3 in peer.bits:
            result = peer.run(calibration.model, batches, bits=3, seed=0)

Each peer is a library in its best standard setting for weights alone; the result is the float model with
the library's decoded weights in it, checked and counted as `cora` counts its own
(`accuracy_baselines.finish`). `unavailable()` names what cannot run here, and why.
"""

from __future__ import annotations

import copy
import functools
import importlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accuracy_baselines import (
    BASELINES,
    Peer,
    PeerResult,
    Stored,
    adapter_rank,
    distinct_levels_ok,
    group_of,
    layer_inputs,
    matrix_of,
    put_weight,
    rate,
    read_affine,
    trace_layers,
)
from torch import Tensor, nn

from cora.batches import Batch
from cora.calibration import quantizable_layers
from cora.fold import FoldedBatchNorm
from cora.lowrank import FloatLayer, LayerShape, rank_bits, unfold
from cora.moments import input_rows

__all__ = ["Peer", "PeerResult", "distinct_levels_ok", "peers", "unavailable"]


def peers() -> list[Peer]:
    """The quantizers that can run here, those in plain torch first."""
    return [*BASELINES, *(peer for peer in LIBRARIES if _absent(peer) is None)]


def unavailable() -> dict[str, str]:
    """Those that cannot run here, and why."""
    reasons = {peer.name: _absent(peer) for peer in LIBRARIES}
    return REFUSED | {name: reason for name, reason in reasons.items() if reason is not None}


@cache
def _absent(peer: Peer) -> str | None:
    for module in peer.needs:
        try:
            _load(module)
        except Exception as error:  # a broken installation fails in its own ways
            return f"{module}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _load(module: str) -> Any:
    """Import a library, quietly."""
    _declare_torchvision()
    with _quiet():
        return importlib.import_module(module)


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _quietly(quantize: Callable[..., dict[str, Stored]]) -> Callable[..., dict[str, Stored]]:
    """A library's progress and advice are of no use in a table."""

    @functools.wraps(quantize)
    def call(*args: Any, **kwargs: Any) -> dict[str, Stored]:
        with _quiet():
            return quantize(*args, **kwargs)

    return call


@cache
def _declare_torchvision() -> None:
    """Let torchvision be imported where its operators, built for CUDA, do not load.

    Libraries import it for its image transforms, and its import fails beside a torch for CPUs for want of
    the names of two operators that they never call.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for op in ("nms", "qnms"):
            _declared[0].define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declared: list[torch.library.Library] = []  # a library that is dropped takes its operators along


# --- What is common ------------------------------------------------------------------------------


def _plain(model: nn.Module) -> nn.Module:
    """The model with no module of cora's own kinds, which libraries would not know."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FoldedBatchNorm):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.Identity())
    return model


def _names(model: nn.Module) -> list[str]:
    return list(quantizable_layers(model)[0])


def _only(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """A predicate: whether all that cora would quantize in a model is of these kinds."""

    def applies(model: nn.Module) -> bool:
        return all(type(layer) in kinds for layer in quantizable_layers(model)[0].values())

    return applies


def _inputs(batch: Batch) -> Any:
    """A batch as torch.jit and most libraries take it: a tensor, or a tuple or dict of them."""
    if batch.kwargs:
        return batch.kwargs
    return batch.args[0] if len(batch.args) == 1 else batch.args


def _run(model: nn.Module, batch: Batch) -> Any:
    return batch.run(model)


def _read(
    layer: FloatLayer,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    symmetric: bool = False,
) -> Stored:
    """A decoded weight of a layer's own shape, with a scale a channel that broadcasts to it.

    Args:
        zero_point: of codes from 0.
    """

    def rows(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().float().expand_as(layer.weight)
        return unfold(tensor, getattr(layer, "transposed", False), getattr(layer, "groups", 1))

    matrix = rows(weight)
    steps, zeros = rows(scale), rows(zero_point)
    if not ((steps == steps[:, :1]).all() and (zeros == zeros[:, :1]).all()):
        raise ValueError("weight: expected one scale and zero-point a channel")
    return read_affine(matrix, steps[:, :1], zeros[:, :1], bits, symmetric)


# --- Brevitas ------------------------------------------------------------------------------------


def _brevitas_model(model: nn.Module, bits: int, symmetric: bool) -> nn.Module:
    """Per channel, scales by least squared error; activations float."""
    common = _load("brevitas_examples.imagenet_classification.ptq.ptq_common")
    quantized: nn.Module = common.quantize_model(
        _plain(model),
        backend="layerwise",
        weight_bit_width=bits,
        # By default it keeps first and last layers of ImageNet's classifiers at 8 bits.
        layerwise_first_last_bit_width=bits,
        act_bit_width=None,
        bias_bit_width=None,
        weight_quant_granularity="per_channel",
        act_quant_percentile=99.999,
        act_quant_type="sym",
        scale_factor_type="float_scale",
        quant_format="int",
        weight_param_method="mse",
        weight_quant_type="sym" if symmetric else "asym",
    )
    return quantized.eval()


def _brevitas_weights(
    model: nn.Module, quantized: nn.Module, bits: int, symmetric: bool
) -> dict[str, Stored]:
    weights = {}
    with torch.no_grad():
        for name, layer in quantizable_layers(model)[0].items():
            q = quantized.get_submodule(name).quant_weight()
            zero = q.zero_point + (2 ** (bits - 1) if symmetric else 0)
            weights[name] = _read(layer, q.value, q.scale, zero, bits, symmetric)
    return weights


@_quietly
def _brevitas_gptq(
    model: nn.Module, batches: Sequence[Batch], *, bits: int, **_: Any
) -> dict[str, Stored]:
    gptq_mode = _load("brevitas.graph.gptq").gptq_mode
    quantized = _brevitas_model(copy.deepcopy(model), bits, symmetric=False)
    with torch.no_grad():
        batches[0].run(quantized)  # it chooses its scales at the first run
    with (
        torch.no_grad(),
        gptq_mode(
            quantized, act_order=True, use_quant_activations=False, create_weight_orig=False
        ) as gptq,
    ):
        for _layer in range(gptq.num_layers):
            for batch in batches:
                batch.run(gptq.model)
            gptq.update()
    return _brevitas_weights(model, quantized, bits, symmetric=False)


@_quietly
def _brevitas_learned_round(
    model: nn.Module, batches: Sequence[Batch], *, bits: int, iterations: int, **_: Any
) -> dict[str, Stored]:
    """AdaRound layer by layer; Adam and 32 images a step, as in the paper.

    Symmetric: of an asymmetric weight it would learn a rounding of the zero-point for each element.
    """
    vision = _load("brevitas_examples.imagenet_classification.ptq.learned_round_utils")
    quantized = _brevitas_model(copy.deepcopy(model), bits, symmetric=True)
    arguments = vision.parse_args_to_dataclass(
        _Arguments(
            learned_round="hard_sigmoid",
            learned_round_loss="regularised_mse",
            learned_round_lr=rate(iterations),
            learned_round_lr_scheduler=None,
            learned_round_iters=iterations,
            learned_round_batch_size=32,
        )
    )
    training = arguments.training_args
    training.use_amp = False
    training.losses_args[0].kwargs = {"max_count": iterations}
    trainer = vision.LearnedRoundTrainer(config=arguments)
    trainer.train(
        model=quantized,
        model_forward=_run,
        block_forward=vision.vision_block_forward,
        data_loader=batches,
        cache=vision.CacheVision(),
        get_blocks_fn=partial(vision.get_blocks, block_check_fn=vision.is_layer),
        keep_gpu=True,
    )
    return _brevitas_weights(model, quantized.eval(), bits, symmetric=True)


class _Arguments:
    """What a command line would have been parsed to."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


# --- AIMET ---------------------------------------------------------------------------------------


def _aimet_config(folder: Path) -> str:
    """Asymmetric weights of layers, a scale a channel; nothing else: ranges of embeddings take it minutes."""
    weight = {"is_quantized": "True", "is_symmetric": "False"}
    config = {
        "defaults": {
            "ops": {
                "is_output_quantized": "True"
            },  # it insists; weights are read out, never outputs
            "params": {"is_quantized": "False", "is_symmetric": "False"},
            "strict_symmetric": "False",
            "per_channel_quantization": "True",
        },
        "params": {},
        "op_type": {
            op: {"params": {"weight": weight}} for op in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        },
        "supergroups": [],
        "model_input": {},
        "model_output": {},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def _aimet_algorithm(adaround: Any) -> Any:
    """Its AdaRound, for models that read their layers' attributes too, as EfficientNet its kernel sizes."""

    class Wrapper(adaround.AdaroundWrapper):  # type: ignore[misc, name-defined]
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module_to_wrap"), name)

    class Algorithm(adaround.Adaround):  # type: ignore[misc, name-defined]
        _get_adaround_wrapper = staticmethod(Wrapper)

    return Algorithm


@_quietly
def _aimet_adaround(
    model: nn.Module, batches: Sequence[Batch], *, bits: int, iterations: int, **_: Any
) -> dict[str, Stored]:
    adaround = _load("aimet_torch.adaround.adaround_weight")
    scheme = _load("aimet_torch.common.defs").QuantScheme.post_training_tf_enhanced
    parameters = adaround.AdaroundParameters(
        data_loader=batches,
        num_batches=len(batches),
        default_num_iterations=iterations,
        forward_fn=_run,
    )
    with tempfile.TemporaryDirectory() as folder:
        rounded = _aimet_algorithm(adaround).apply_adaround(
            _plain(copy.deepcopy(model)),
            _one_sample(batches),
            parameters,
            path=folder,
            filename_prefix="weights",
            default_param_bw=bits,
            default_quant_scheme=scheme,
            default_config_file=_aimet_config(Path(folder)),
        )
        text = (Path(folder) / "weights.encodings").read_text()
    encodings = json.loads(text)["param_encodings"]
    weights = {}
    for name, layer in quantizable_layers(model)[0].items():
        found = encodings.get(f"{name}.weight")
        if not found:
            continue  # it stays float, and is counted as float
        axis = [-1 if d == _channel_axis(layer) else 1 for d in range(layer.weight.dim())]
        scale, zero = (
            torch.tensor([float(e[key]) for e in found]).reshape(axis)
            for key in ("scale", "offset")
        )
        # What the rounding leaves between two codes goes to the nearest, as in its simulation.
        soft = rounded.get_submodule(name).weight.detach()
        codes = ((soft / scale).round() - zero).clamp(0, 2**bits - 1)
        weights[name] = _read(layer, (codes + zero) * scale, scale, -zero, bits)
    return weights


def _one_sample(batches: Sequence[Batch]) -> Any:
    """What it traces a model with: positional arguments only."""
    sample = batches[0][:1]
    return (*sample.args, *sample.kwargs.values())


def _channel_axis(layer: FloatLayer) -> int:
    return 1 if getattr(layer, "transposed", False) else 0


@_quietly
def _aimet_seq_mse(
    model: nn.Module, batches: Sequence[Batch], *, bits: int, **_: Any
) -> dict[str, Stored]:
    """The range of each layer with the least error of its output, the layers before it quantized."""
    simulation = _load("aimet_torch.quantsim").QuantizationSimModel
    seq_mse = _load("aimet_torch.seq_mse")
    with tempfile.TemporaryDirectory() as folder:
        sim = simulation(
            _plain(copy.deepcopy(model)),
            _one_sample(batches),
            default_param_bw=bits,
            config_file=_aimet_config(Path(folder)),
        )
    seq_mse.apply_seq_mse(sim, batches, num_candidates=20, forward_fn=_run)
    sim.compute_encodings(batches[0].run)
    weights = {}
    with torch.no_grad():
        for name, layer in quantizable_layers(model)[0].items():
            quantizer = sim.model.get_submodule(name).param_quantizers["weight"]
            if quantizer is None:
                continue
            scale, offset = quantizer.get_scale(), quantizer.get_offset()
            value = quantizer(layer.weight).dequantize()
            shift = 2 ** (bits - 1) if quantizer.signed else 0
            weights[name] = _read(layer, value, scale, shift - offset, bits)
    return weights


# --- optimum-quanto ------------------------------------------------------------------------------


@_quietly
def _quanto(
    optimizer: str | None, model: nn.Module, batches: Sequence[Batch], *, bits: int, **_: Any
) -> dict[str, Stored]:
    """Its own groups: 128 weights, or the next smaller of 96, 64 and 32 that divides a row."""
    quanto = _load("optimum.quanto")
    quantized = _plain(copy.deepcopy(model))
    chosen = None if optimizer is None else getattr(quanto, optimizer)()
    quanto.quantize(quantized, weights=getattr(quanto, f"qint{bits}"), optimizer=chosen)
    quanto.freeze(quantized)
    weights = {}
    for name, layer in quantizable_layers(model)[0].items():
        q = quantized.get_submodule(name).weight
        if not isinstance(q, quanto.QTensor):
            continue
        matrix = q.dequantize().detach().float().reshape(len(layer.weight), -1)
        group = getattr(q, "_group_size", None) or matrix.shape[1]
        scale = q._scale.reshape(len(matrix), -1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # 0 of a constant channel
        if bits == 8:
            zero = torch.full_like(scale, 128)
        elif q._shift.dtype.is_floating_point:  # an offset, not a whole zero-point
            zero = q._shift.reshape(scale.shape) / scale
        else:
            zero = q._shift.reshape(scale.shape).float()
        if scale.shape[1] * group != matrix.shape[1]:
            raise ValueError(f"{name}: expected scales of {group} weights, got {list(scale.shape)}")
        weights[name] = read_affine(matrix, scale, zero, bits, symmetric=bits == 8)
    return weights


# --- Quantizers of matrices ----------------------------------------------------------------------


@_quietly
def _torchao(
    algorithm: str,
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    bits: int,
    group_size: int | None,
    **_: Any,
) -> dict[str, Stored]:
    """A convolution's weight is given to it as the matrix of a Linear."""
    api = _load("torchao.quantization")
    granularity = _load("torchao.quantization.granularity")
    algorithms = _load("torchao.quantization.quantize_.workflows").IntxChooseQParamsAlgorithm
    symmetric = algorithm != "AFFINE"
    mapping = api.MappingType.SYMMETRIC if symmetric else api.MappingType.ASYMMETRIC
    weights = {}
    for name, layer in quantizable_layers(model)[0].items():
        matrix = matrix_of(layer)
        group = group_of(matrix.shape[1], group_size)
        linear = nn.Linear(matrix.shape[1], len(matrix), bias=False)
        linear.weight = nn.Parameter(matrix)
        whole = group == matrix.shape[1]
        config = api.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=granularity.PerAxis(0) if whole else granularity.PerGroup(group),
            mapping_type=mapping,
            intx_choose_qparams_algorithm=getattr(algorithms, algorithm),
        )
        api.quantize_(linear, config)
        q = linear.weight
        scale = q.scale.reshape(len(matrix), -1).float()
        zero = q.zero_point.reshape(scale.shape).float() + 2 ** (bits - 1)
        weights[name] = read_affine(q.dequantize(), scale, zero, bits, symmetric)
    return weights


# --- GPTQModel -----------------------------------------------------------------------------------


@_quietly
def _gptqmodel(
    eora_share: float | None,
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    bits: int,
    group_size: int | None,
    seed: int,
    **_: Any,
) -> dict[str, Stored]:
    """GPTQ layer by layer, the layers before it quantized; asymmetric.

    Args:
        eora_share: with EoRA's float16 adapters, of such a share of the float weights; None without.
    """
    gptq = _load("gptqmodel.quantization.gptq")
    config = _load("gptqmodel.quantization.config")
    student = _plain(copy.deepcopy(model))
    layers = quantizable_layers(student)[0]
    weights = {}
    for name, calls in trace_layers(model, batches[0])[0].items():
        layer, matrix = layers[name], matrix_of(layers[name])
        group = group_of(matrix.shape[1], group_size)
        whole = group == matrix.shape[1]
        settings = config.QuantizeConfig(
            # In the order of their inputs' energy; with groups, columns stay where their scale is.
            bits=bits, group_size=-1 if whole else group, sym=False, desc_act=whole,
            act_group_aware=False,
        )  # fmt: skip
        task = gptq.GPTQ(layer, settings)
        task.quantizer.configure(perchannel=True)
        moment = matrix.new_zeros(LayerShape.of(layer).groups, matrix.shape[1], matrix.shape[1])
        for batch in batches:
            for x in layer_inputs(student, layer, batch, calls):
                with torch.no_grad():
                    task.add_batch(x, layer(x))
                if eora_share is not None:
                    rows = input_rows(layer, x, 2**14, torch.Generator().manual_seed(seed))
                    moment += rows.transpose(1, 2) @ rows / rows.shape[1]
        decoded, scale, zero = task.quantize()[:3]
        stored = read_affine(decoded.reshape(matrix.shape), scale, zero, bits)
        if eora_share is not None:
            stored = _eora(stored, matrix, moment, eora_share)
        weights[name] = stored
        put_weight(layer, stored)
    return weights


def _eora(stored: Stored, matrix: Tensor, moment: Tensor, share: float) -> Stored:
    eora = _load("gptqmodel.eora.eora")
    shape = LayerShape(*matrix.shape, len(moment))
    rank = adapter_rank(shape, share)
    if not rank:
        return stored
    products = []
    residual = (matrix - stored.matrix).reshape(shape.groups, -1, shape.columns)
    for part, seen in zip(residual, moment, strict=True):
        a, b = eora.eora_compute_lora(
            part, "", seen, rank, dtype=torch.float16, device=torch.device("cpu")
        )
        products.append(b.float() @ a.float())
    adapter = torch.stack(products).reshape(matrix.shape)
    return replace(stored, adapter=adapter, adapter_bits=rank * rank_bits(shape, 16))


# --- NNCF ----------------------------------------------------------------------------------------


class _Whole(nn.Module):
    """A Sequential as a part: NNCF keeps a module of its own in the model, which it would run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


@_quietly
def _nncf(
    model: nn.Module, batches: Sequence[Batch], *, bits: int, group_size: int | None, **_: Any
) -> dict[str, Stored]:
    """Asymmetric weight compression with scales estimated on the calibration data."""
    nncf = _load("nncf")
    unpack = _load("nncf.torch.quantization.quantize_functions").unpack_uint4
    part = _plain(copy.deepcopy(model))
    inside = "model." if isinstance(part, nn.Sequential) else ""
    quantized = nncf.compress_weights(
        _Whole(part) if inside else part,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=-1 if group_size is None else group_size,
        dataset=nncf.Dataset([_inputs(batch) for batch in batches]),
        subset_size=len(batches),
        all_layers=True,
        ratio=1.0,
        scale_estimation=True,
    )
    hooks = dict(quantized.named_modules())
    weights = {}
    for name in _names(model):
        place = f"{inside}{name}.weight".replace(".", ":")
        hook = hooks.get(f"__nncf_hooks.post_hooks.{place}__0.0")
        if type(hook).__name__ != "INT4AsymmetricWeightsDecompressor":
            continue  # it stays float, and is counted as float
        matrix = hook(quantized.get_submodule(inside + name).weight.data).float()
        scale = hook._scale.float().reshape(len(matrix), -1)
        zero = unpack(hook._zero_point).reshape(scale.shape).float()
        weights[name] = read_affine(matrix, scale, zero, bits)
    return weights


# --- The list ------------------------------------------------------------------------------------

_CONVS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_ANY = tuple(range(2, 9))
_VISION = "brevitas_examples.imagenet_classification.ptq.learned_round_utils"

LIBRARIES = (
    Peer(
        "Brevitas GPTQ",
        _ANY,
        ("per_channel",),
        _brevitas_gptq,
        _only(*_CONVS),
        ("brevitas", "brevitas_examples.imagenet_classification.ptq.ptq_common"),
    ),
    Peer(
        "Brevitas learned round",
        _ANY,
        ("per_channel",),
        _brevitas_learned_round,
        _only(*_CONVS),
        ("brevitas", _VISION),
        iterations=10_000,
    ),
    Peer(
        "AIMET AdaRound",
        _ANY,
        ("per_channel",),
        _aimet_adaround,
        _only(nn.Linear, nn.Conv2d, nn.ConvTranspose2d),
        ("aimet_torch.adaround.adaround_weight",),
        iterations=15_000,
    ),
    Peer(
        "AIMET sequential MSE",
        _ANY,
        ("per_channel",),
        _aimet_seq_mse,
        _only(nn.Linear, nn.Conv2d),
        ("aimet_torch.seq_mse",),
    ),
    Peer(
        "quanto, min and max",
        (2, 4, 8),
        ("per_channel",),
        partial(_quanto, None),
        _only(nn.Linear, nn.Conv2d),
        ("optimum.quanto",),
    ),
    Peer(
        "quanto, HQQ",
        (2, 4),
        ("per_channel",),
        partial(_quanto, "HqqOptimizer"),
        _only(nn.Linear),  # of a convolution it shifts each place of the kernel by itself
        ("optimum.quanto",),
    ),
    Peer(
        "torchao, min and max",
        _ANY,
        ("per_channel", "per_group"),
        partial(_torchao, "AFFINE"),
        needs=("torchao.quantization",),
    ),
    Peer(
        "torchao, HQQ scales",
        _ANY,
        ("per_channel", "per_group"),
        partial(_torchao, "HQQ_SCALE_ONLY"),
        needs=("torchao.quantization",),
    ),
    Peer(
        "NNCF weight compression",
        (4,),  # it knows 8 bits besides, and gives those to convolutions
        ("per_channel", "per_group"),
        _nncf,
        _only(nn.Linear),
        ("nncf.torch",),
    ),
    Peer(
        "GPTQModel GPTQ",
        (2, 3, 4, 8),
        ("per_channel", "per_group"),
        partial(_gptqmodel, None),
        _only(nn.Linear, nn.Conv2d),
        ("gptqmodel.quantization.gptq",),
    ),
    Peer(
        "GPTQModel GPTQ + EoRA",
        (2, 3, 4, 8),
        ("per_channel", "per_group"),
        partial(_gptqmodel, 0.05),
        _only(nn.Linear, nn.Conv2d),
        ("gptqmodel.eora.eora", "gptqmodel.quantization.gptq"),
    ),
)

# Libraries and settings that were tried and are not listed above, whatever the machine.
REFUSED = {
    "NNCF, convolutions": "nncf 3.4: post-training quantization takes 8 bits only (num_bits=4: "
    "'incompatible with HW capabilities'), weight compression gives convolutions 8 bits",
    "peft LoftQ": "peft 0.21: loftq_init computes on CUDA or XPU only, in NF4 or int8; "
    "'LoftQ, own' stands in",
    "Brevitas, learned rounding of asymmetric weights": "brevitas 0.13: it rounds the zero-point for "
    "each element too, so that a channel has several; the symmetric setting is listed",
    "quanto HQQ, convolutions": "optimum-quanto 0.2.7: each place of the kernel gets its own shift",
    "quanto, 3 bits": "optimum-quanto 0.2.7: 2, 4 and 8 bits only",
}
