"""The libraries that cora is timed against: each peer is a name, a reason to be absent, and a maker.

`make(work, threads)` prepares everything once (weights packed, graph compiled, memory bound) and
returns a call that only computes. Each peer runs in the setting that is fastest for it here: its own
weight layout, channels last where it has the choice, static int8 ranges in convolutions, blocks of
128 in 4-bit weights unless it knows one size only.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from layers import Conv, Linear
from timing import Seconds
from torch import Tensor, nn

Call = Callable[[], object]


@dataclass(frozen=True)
class LinearWork:
    """y = x W^T, float32 x; `weights` are read in turns, so that they come from memory."""

    shape: Linear
    x: Tensor
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class ConvWork:
    """A convolution with bias; `codes`: uint8 in and out (zero-point 0, so ReLU), else float32."""

    shape: Conv
    x: Tensor  # float32 [n, c, h, w], not negative, at most 1
    weight: Tensor
    bias: Tensor
    codes: bool


@dataclass(frozen=True)
class NetworkWork:
    """A whole float network in eval mode with BatchNorm folded, float32 in and out."""

    name: str
    model: nn.Module
    x: Tensor
    calibration: tuple[Tensor, ...]


@dataclass(frozen=True)
class Peer:
    """A library in one setting.

    Args:
        name: as in the tables.
        bits: of its weights.
        make: (work, threads) -> call.
        needs: modules that must be importable.
        lacks: says why it cannot run here, None if it can.
    """

    name: str
    bits: int
    make: Callable[[Any, int], Call]
    needs: tuple[str, ...] = ()
    lacks: Callable[[], str | None] = lambda: None

    def absent(self) -> str | None:
        """The reason why this peer cannot run here, or None."""
        for module in self.needs:
            try:
                importlib.import_module(module)
            except Exception as error:  # a broken installation fails in its own ways
                return f"{module}: {type(error).__name__}: {str(error).splitlines()[0]}"
        return self.lacks()


def turns(calls: Iterable[Call]) -> Call:
    """A call that runs one of the calls, the next one each time."""
    calls = tuple(calls)
    if len(calls) == 1:
        return calls[0]
    cycle = itertools.cycle(calls)
    return lambda: next(cycle)()


class _Run:
    """A call that keeps its result where the library left it; `result()` fetches it, not timed."""

    def __init__(self, call: Call, result: Callable[[], Any], input: Any = None) -> None:
        self.call, self.result = call, result
        self.input = input  # the library reads it in place and does not own it

    def __call__(self) -> object:
        return self.call()


def result(call: Call) -> Tensor:
    """What the last run of a call computed, as float32 in torch's order of dimensions (codes as they
    are)."""
    value = call.result() if isinstance(call, _Run) else call()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    if value.is_quantized:
        value = value.int_repr()
    return value.float()


def _symmetric(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """int8 codes and a scale per row."""
    largest = 2 ** (bits - 1) - 1
    flat = weight.reshape(weight.shape[0], -1)
    scale = flat.abs().amax(1).clamp(min=1e-8) / largest
    codes = torch.round(flat / scale[:, None]).clamp(-largest, largest)
    return codes.to(torch.int8).reshape(weight.shape), scale


# --- torch ---------------------------------------------------------------------------------------


def _torch_linear(dtype: torch.dtype, work: LinearWork, _: int) -> Call:
    x = work.x.to(dtype)
    return turns(partial(F.linear, x, w.to(dtype)) for w in work.weights)


def _torch_int8_linear(work: LinearWork, _: int) -> Call:
    def call(weight: Tensor) -> Call:
        codes, scale = _symmetric(weight)
        zero = torch.zeros(len(scale), dtype=torch.int64)
        q = torch._make_per_channel_quantized_tensor(codes, scale.double(), zero, 0)
        packed = torch.ops.quantized.linear_prepack(q, None)
        return lambda: torch.ops.quantized.linear_dynamic(work.x, packed)

    with _quantized_engine("onednn"):
        return turns([call(w) for w in work.weights])


class _quantized_engine:
    """The engine that packs a weight also runs it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.name

    def __exit__(self, *_: object) -> None:
        torch.backends.quantized.engine = self.before


def _no_onednn_engine() -> str | None:
    engines = torch.backends.quantized.supported_engines
    return None if "onednn" in engines else f"torch has no quantized engine onednn, only {engines}"


def _torch_int4pack(work: LinearWork, _: int, group: int = 128) -> Call:
    x = work.x.to(torch.bfloat16)

    def call(weight: Tensor) -> Call:
        n, k = weight.shape
        codes, scale = _symmetric(weight.reshape(-1, group), 4)
        nibbles = (codes.reshape(n, k).to(torch.int32) + 8).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        scales = scale.reshape(n, k // group).T
        pairs = torch.stack([scales, torch.zeros_like(scales)], -1).to(torch.bfloat16).contiguous()
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, pairs)

    return turns([call(w) for w in work.weights])


def _no_int4pack() -> str | None:
    op = "_weight_int4pack_mm_for_cpu"
    return None if hasattr(torch.ops.aten, op) else f"this torch has no {op}"


def _torch_conv(dtype: torch.dtype, work: ConvWork, _: int) -> Call:
    x, weight = (
        t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (work.x, work.weight)
    )
    s = work.shape
    return partial(torch.conv2d, x, weight, work.bias.to(dtype), s.stride, s.padding, 1, s.groups)


def _torch_int8_conv(work: ConvWork, _: int) -> Call:
    s = work.shape
    codes, scale = _symmetric(work.weight)
    zero = torch.zeros(len(scale), dtype=torch.int64)
    q = torch._make_per_channel_quantized_tensor(codes, scale.double(), zero, 0)
    with _quantized_engine("onednn"):
        packed = torch.ops.quantized.conv2d_prepack(
            q, work.bias, [s.stride] * 2, [s.padding] * 2, [1, 1], s.groups
        )
    x = work.x.contiguous(memory_format=torch.channels_last)
    qx = torch.quantize_per_tensor(x, 1 / 255, 0, torch.quint8)
    if work.codes:
        return lambda: torch.ops.quantized.conv2d(qx, packed, OUT_SCALE, 0)
    return lambda: torch.ops.quantized.conv2d(
        torch.quantize_per_tensor(x, 1 / 255, 0, torch.quint8), packed, OUT_SCALE, 128
    ).dequantize()


OUT_SCALE = 0.05  # of quantized outputs; speed does not depend on it


def _torch_network(dtype: torch.dtype, work: NetworkWork, _: int) -> Call:
    model = copy.deepcopy(work.model).to(dtype).to(memory_format=torch.channels_last)
    x = work.x.to(dtype).contiguous(memory_format=torch.channels_last)
    return lambda: model(x)


# --- onnxruntime ---------------------------------------------------------------------------------


@dataclass
class _Graph:
    """An ONNX graph in the making, one output."""

    def __post_init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any, as_type: Any = None) -> str:
        import onnx

        array = np.ascontiguousarray(value.numpy() if isinstance(value, Tensor) else value)
        self.constants.append(
            onnx.numpy_helper.from_array(array.astype(as_type or array.dtype), name)
        )
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        import onnx

        self.nodes.append(onnx.helper.make_node(op, inputs, [output], **attributes))
        return output

    def model(self, dtype_in: Any, shape_in: Any, dtype_out: Any, shape_out: Any) -> bytes:
        import onnx

        def info(name: str, dtype: Any, shape: Any) -> Any:
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            return onnx.helper.make_tensor_value_info(name, kind, list(shape))

        graph = onnx.helper.make_graph(
            self.nodes,
            "work",
            [info("x", dtype_in, shape_in)],
            [info("y", dtype_out, shape_out)],
            self.constants,
        )
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return bytes(model.SerializeToString())


def _ort(model: bytes | str, x: np.ndarray[Any, Any], threads: int) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its idle threads stop spinning between the calls, or they would slow the next contestant.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, x)
    binding.bind_output(session.get_outputs()[0].name)
    run = partial(session.run_with_iobinding, binding)
    return _Run(run, lambda: binding.copy_outputs_to_cpu()[0], x)


def _onnx_linear(weight: Tensor, m: int, kind: str) -> bytes:
    n, k = weight.shape
    graph = _Graph()
    if kind == "float":
        graph.add("MatMul", ["x", graph.constant("w", weight.T.contiguous())], "y")
    elif kind == "int8":
        codes, scale = _symmetric(weight)
        graph.add("DynamicQuantizeMatMul", [
            "x",
            graph.constant("w", codes.T.contiguous()),
            graph.constant("s", scale),
        ], "y", domain="com.microsoft")  # fmt: skip
    else:
        block, level = (int(part) for part in kind.split(":"))
        codes, scale = _symmetric(weight.reshape(-1, block), 4)
        nibbles = (codes.reshape(n, k // block, block) + 8).to(torch.uint8)
        packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
        inputs = ["x", graph.constant("w", packed), graph.constant("s", scale)]
        graph.add(
            "MatMulNBits", inputs, "y", domain="com.microsoft",
            K=k, N=n, bits=4, block_size=block, accuracy_level=level,
        )  # fmt: skip
    return graph.model(np.float32, (m, k), np.float32, (m, n))


def _ort_linear(kind: str, work: LinearWork, threads: int) -> Call:
    m = work.shape.m
    return turns([_ort(_onnx_linear(w, m, kind), work.x.numpy(), threads) for w in work.weights])


def _onnx_conv(work: ConvWork, quantized: bool) -> bytes:
    """Float, or between quantizers; with codes in and out when the work says so."""
    s = work.shape
    graph, where = _Graph(), _onnx_geometry(s)
    if not quantized:
        graph.add(
            "Conv",
            ["x", graph.constant("w", work.weight), graph.constant("b", work.bias)],
            "y",
            **where,
        )
        return graph.model(np.float32, s.input, np.float32, s.output)
    codes, scale = _symmetric(work.weight)
    inside, outside = (("xs", "xz"), ("ys", "yz"))
    graph.constant("xs", np.float32(1 / 255))
    graph.constant("xz", np.uint8(0))
    graph.constant("ys", np.float32(OUT_SCALE))
    graph.constant("yz", np.uint8(0 if work.codes else 128))
    x = "x" if work.codes else graph.add("QuantizeLinear", ["x", *inside], "xq")
    graph.add("DequantizeLinear", [x, *inside], "xd")
    inputs = [
        graph.constant("w", codes),
        graph.constant("ws", scale),
        graph.constant("wz", np.zeros(s.out, np.int8)),
    ]
    graph.add("DequantizeLinear", inputs, "wd", axis=0)
    bias = torch.round(work.bias / (scale / 255))
    inputs = [graph.constant("b", bias, np.int32), graph.constant("bs", scale / 255)]
    graph.add("DequantizeLinear", inputs, "bd", axis=0)
    graph.add("Conv", ["xd", "wd", "bd"], "yf", **where)
    graph.add("QuantizeLinear", ["yf", *outside], "y" if work.codes else "yq")
    if work.codes:
        return graph.model(np.uint8, s.input, np.uint8, s.output)
    graph.add("DequantizeLinear", ["yq", *outside], "y")
    return graph.model(np.float32, s.input, np.float32, s.output)


def _onnx_nhwc_conv(work: ConvWork) -> bytes:
    """onnxruntime's own channels-last operator, what its optimizer makes inside of a network."""
    s = work.shape
    codes, scale = _symmetric(work.weight)
    graph = _Graph()
    inputs = [
        "x", graph.constant("xs", np.float32(1 / 255)), graph.constant("xz", np.uint8(0)),
        graph.constant("w", codes), graph.constant("ws", scale), graph.constant("wz", np.zeros(s.out, np.int8)),
        graph.constant("ys", np.float32(OUT_SCALE)), graph.constant("yz", np.uint8(0)),
        graph.constant("b", torch.round(work.bias / (scale / 255)), np.int32),
    ]  # fmt: skip
    graph.add(
        "QLinearConv", inputs, "y", domain="com.microsoft", channels_last=1, **_onnx_geometry(s)
    )
    nhwc = [tuple(shape[i] for i in (0, 2, 3, 1)) for shape in (s.input, s.output)]
    return graph.model(np.uint8, nhwc[0], np.uint8, nhwc[1])


def _onnx_geometry(s: Conv) -> dict[str, Any]:
    return {
        "kernel_shape": [s.kernel] * 2,
        "strides": [s.stride] * 2,
        "pads": [s.padding] * 4,
        "group": s.groups,
    }


def _codes(x: Tensor) -> Tensor:
    return torch.round(x * 255).to(torch.uint8)


def _ort_conv(quantized: bool, work: ConvWork, threads: int) -> Call:
    if quantized and work.codes:
        x = _codes(work.x).permute(0, 2, 3, 1).contiguous().numpy()
        call = _ort(_onnx_nhwc_conv(work), x, threads)
        return _Run(call, lambda: call.result().transpose(0, 3, 1, 2), x)
    return _ort(_onnx_conv(work, quantized), work.x.contiguous().numpy(), threads)


@cache
def _scratch() -> Path:
    """Where converted networks are kept: quantizing one takes a peer seconds to a minute."""
    import tempfile

    named = os.environ.get("CORA_PEERS_CACHE")
    path = Path(named) if named else Path(tempfile.mkdtemp(prefix="cora-peers-"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def _kept(work: NetworkWork, suffix: str) -> Path:
    return _scratch() / f"{work.name}-{work.x.shape[0]}{suffix}"


def _onnx_network(work: NetworkWork) -> Path:
    path = _kept(work, ".onnx")
    if not path.exists():
        torch.onnx.export(
            work.model, (work.x,), str(path), dynamo=False, opset_version=17, input_names=["x"]
        )
    return path


def _ort_network(quantized: bool, work: NetworkWork, threads: int) -> Call:
    path = _onnx_network(work)
    if quantized:
        path = _quantized_onnx(path, work)
    return _ort(str(path), work.x.contiguous().numpy(), threads)


def _quantized_onnx(path: Path, work: NetworkWork) -> Path:
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    done = path.with_suffix(".int8.onnx")
    if done.exists():
        return done
    n = work.x.shape[0]
    samples = torch.cat(work.calibration)

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            whole = (
                samples[: len(samples) // n * n]
                if len(samples) >= n
                else samples.repeat(n, 1, 1, 1)[:n]
            )
            self.batches = iter(whole.split(n))

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    q.quantize_static(
        str(prepared), str(done), Reader(), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
    )  # fmt: skip
    return done


# --- OpenVINO ------------------------------------------------------------------------------------


def _openvino(
    model: Any, x: np.ndarray[Any, Any], threads: int, precision: str | None = None
) -> Call:
    import openvino

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    return _Run(request.infer, lambda: request.get_output_tensor().data, x)


def _nncf() -> Any:
    import logging

    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf


def _read_openvino(model: bytes) -> Any:
    import openvino

    return openvino.Core().read_model(model)


def _openvino_linear(kind: str, work: LinearWork, threads: int) -> Call:
    precision = "f32" if kind == "f32" else None
    x = work.x.numpy()
    models = [_openvino_product(kind, weight, i) for i, weight in enumerate(work.weights)]
    for model in models:
        model.reshape([work.shape.m, work.shape.k])
    return turns([_openvino(model, x, threads, precision) for model in models])


def _openvino_product(kind: str, weight: Tensor, copy: int) -> Any:
    """x W^T for any number of rows; compressed weights are kept, making them takes many seconds."""
    import openvino
    from openvino import opset13 as op

    n, k = weight.shape
    path = _scratch() / f"openvino-{kind}-{n}x{k}-{copy}.xml"
    if path.exists():
        return openvino.Core().read_model(path)
    x = op.parameter([-1, k], np.float32, name="x")
    whole = openvino.Model([op.matmul(x, op.constant(weight.numpy()), False, True)], [x], "work")
    if kind == "f32":
        return whole
    nncf = _nncf()
    modes = nncf.CompressWeightsMode
    if kind == "int8":
        whole = nncf.compress_weights(whole, mode=modes.INT8_ASYM)
    else:
        whole = nncf.compress_weights(
            whole, mode=modes.INT4_SYM, group_size=128, ratio=1.0, all_layers=True
        )
    openvino.save_model(whole, path, compress_to_fp16=False)
    return whole


def _openvino_conv(kind: str, work: ConvWork, threads: int) -> Call:
    if kind == "int8" and work.codes:
        return _openvino_codes_conv(work, threads)
    model = _read_openvino(_onnx_conv(work, kind == "int8"))
    return _openvino(model, work.x.contiguous().numpy(), threads, None if kind == "int8" else kind)


def _openvino_codes_conv(work: ConvWork, threads: int) -> Call:
    """Timed by OpenVINO's own profile of the convolution: it cannot leave codes channels last at a
    network's end, and the layout change there is no work of the convolution."""
    import openvino
    from openvino import opset13 as op

    s = work.shape
    codes, scale = _symmetric(work.weight)
    x = op.parameter([s.batch, s.size, s.size, s.channels], np.uint8)
    y = op.multiply(op.convert(x, np.float32), np.float32(1 / 255))
    y = op.transpose(y, [0, 3, 1, 2])
    w = op.convert(op.constant(codes.numpy()), np.float32)
    w = op.multiply(w, op.constant(scale.numpy().reshape(-1, 1, 1, 1)))
    y = op.convolution(y, w, [s.stride] * 2, [s.padding] * 2, [s.padding] * 2, [1, 1])
    y = op.relu(op.add(y, op.constant(work.bias.numpy().reshape(1, -1, 1, 1))))
    largest = np.float32(255 * OUT_SCALE)
    y = op.fake_quantize(y, np.float32(0), largest, np.float32(0), largest, 256)
    y = op.transpose(y, [0, 2, 3, 1])
    y = op.round(op.multiply(y, np.float32(1 / OUT_SCALE)), "half_to_even")
    y = op.convert(y, np.uint8)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
    model = openvino.Core().compile_model(openvino.Model([y], [x], "work"), "CPU", settings)
    request = model.create_infer_request()
    values = _codes(work.x).permute(0, 2, 3, 1).contiguous().numpy()
    request.set_input_tensor(openvino.Tensor(values, shared_memory=True))

    def call() -> Seconds:
        request.infer()
        nodes = [node for node in request.profiling_info if node.node_type == "Convolution"]
        if not nodes or not nodes[0].exec_type.endswith("I8"):
            raise RuntimeError("OpenVINO did not run the convolution in int8")
        return Seconds(nodes[0].real_time.total_seconds())

    return _Run(call, lambda: request.get_output_tensor().data.transpose(0, 3, 1, 2), values)


def _openvino_network(kind: str, work: NetworkWork, threads: int) -> Call:
    model = _quantized_openvino(work) if kind == "int8" else _converted_openvino(work)
    return _openvino(model, work.x.contiguous().numpy(), threads, None if kind == "int8" else kind)


def _converted_openvino(work: NetworkWork) -> Any:
    import openvino

    return openvino.convert_model(work.model, example_input=work.x, input=[list(work.x.shape)])


def _quantized_openvino(work: NetworkWork) -> Any:
    import openvino

    nncf = _nncf()
    path = _kept(work, ".xml")
    if not path.exists():
        n = work.x.shape[0]
        images = torch.cat(work.calibration)
        images = images.repeat(-(-n // len(images)), 1, 1, 1) if len(images) < n else images
        batches = [b.numpy() for b in images[: len(images) // n * n].split(n)]
        model = nncf.quantize(
            _converted_openvino(work),
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(batches),
        )
        openvino.save_model(model, path, compress_to_fp16=False)
    return openvino.Core().read_model(path)


# --- bitsandbytes --------------------------------------------------------------------------------


def _bitsandbytes(work: LinearWork, threads: int) -> Call:
    x = work.x.to(torch.bfloat16)
    return turns([partial(_nf4_layer(weight), x) for weight in work.weights])


@lru_cache(maxsize=9)
def _nf4_layer(weight: Tensor) -> nn.Module:
    import bitsandbytes

    n, k = weight.shape
    layer: nn.Module = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.to(torch.bfloat16), requires_grad=False, quant_type="nf4"
    )
    return layer.to("cpu").eval()


# --- ggml ----------------------------------------------------------------------------------------

GGML = "CORA_GGML"  # names a folder with ggml built for this machine
# Its AMX product configures the tiles once a thread and crashes where another library uses AMX too;
# set for a build that is cured of it.
GGML_AMX = "CORA_GGML_AMX"
_Q4_0, _F32 = 2, 0


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


@cache
def _ggml() -> Any:
    """ggml's C interface: from the folder that CORA_GGML names, else out of the package xllamacpp."""
    folder = os.environ.get(GGML)
    if folder:
        found = sorted(Path(folder).rglob("libggml*.so"), key=lambda path: "base" not in path.name)
        libraries = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in found]
    else:
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"neither {GGML} names a folder nor is xllamacpp installed")
        found = list(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))
        libraries = [ctypes.CDLL(str(path)) for path in found]

    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
        "ggml_mul_mat": (pointer, [pointer] * 3),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer] * 2),
        "ggml_nbytes": (size, [pointer]),
        "ggml_quantize_chunk": (
            size, [ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer],
        ),
        "ggml_backend_cpu_init": (pointer, []),
        "ggml_backend_cpu_set_n_threads": (None, [pointer, ctypes.c_int]),
        "ggml_backend_cpu_buffer_type": (pointer, []),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer] * 2),
        "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, size, size]),
        "ggml_backend_graph_compute": (ctypes.c_int, [pointer] * 2),
        "ggml_backend_get_device": (pointer, [pointer]),
        "ggml_backend_dev_backend_reg": (pointer, [pointer]),
        "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_buft_name": (ctypes.c_char_p, [pointer]),
    }  # fmt: skip

    class Functions:
        pass

    functions: Any = Functions()
    for name, (result, arguments) in signatures.items():
        function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
        if function is None:
            raise ImportError(f"{found[0] if found else folder} has no {name}")
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    return functions


def _no_ggml() -> str | None:
    try:
        _ggml()
    except (ImportError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def ggml_buffers() -> dict[str, int]:
    """Where ggml can keep a weight: plain, and the layouts it rearranges weights into."""
    ggml = _ggml()
    backend = ggml.ggml_backend_cpu_init()
    registry = ggml.ggml_backend_dev_backend_reg(ggml.ggml_backend_get_device(backend))
    plain = ggml.ggml_backend_cpu_buffer_type()
    kinds = {ggml.ggml_backend_buft_name(plain).decode(): plain}
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        listed = extra(ggml.ggml_backend_get_device(backend))
        for i in itertools.count():
            if not listed[i]:
                break
            kinds[ggml.ggml_backend_buft_name(listed[i]).decode()] = listed[i]
    return kinds


def _ggml_linear(work: LinearWork, threads: int) -> Call:
    """In the weight layout that is fastest for this number of rows."""
    from timing import in_turns

    kinds = ggml_buffers()
    if work.shape.m > 1 and not os.environ.get(GGML_AMX):
        kinds.pop("AMX", None)
    first = dataclasses.replace(work, weights=work.weights[:1])
    tried = in_turns({name: _ggml_layout(first, threads, kinds[name]) for name in kinds}, 0.02)
    return _ggml_layout(work, threads, kinds[min(tried, key=lambda name: tried[name].median)])


def _ggml_layout(work: LinearWork, threads: int, kind: int) -> Call:
    ggml, s = _ggml(), work.shape
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)

    def call(weight: Tensor) -> Call:
        codes = np.empty(s.n * s.k // 32 * 18, np.uint8)
        source = weight.contiguous().numpy()
        ggml.ggml_quantize_chunk(_Q4_0, source.ctypes.data, codes.ctypes.data, 0, s.n, s.k, None)
        holder, user = (ggml.ggml_init(_InitParams(1 << 20, None, True)) for _ in range(2))
        w = ggml.ggml_new_tensor_2d(holder, _Q4_0, s.k, s.n)
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(holder, kind)
        ggml.ggml_backend_tensor_set(w, codes.ctypes.data, 0, codes.nbytes)
        x = ggml.ggml_new_tensor_2d(user, _F32, s.k, s.m)
        y = ggml.ggml_mul_mat(user, w, x)
        graph = ggml.ggml_new_graph(user)
        ggml.ggml_build_forward_expand(graph, y)
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(user, ggml.ggml_backend_cpu_buffer_type())
        values = work.x.numpy()
        ggml.ggml_backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
        out = np.empty((s.m, s.n), np.float32)

        def run() -> np.ndarray[Any, Any]:
            ggml.ggml_backend_graph_compute(backend, graph)
            ggml.ggml_backend_tensor_get(y, out.ctypes.data, 0, out.nbytes)
            return out

        return run

    return turns([call(w) for w in work.weights])


# --- The lists -----------------------------------------------------------------------------------

_ONNX = ("onnx", "onnxruntime")
_OPENVINO = ("openvino", "nncf")

LINEAR_PEERS = (
    Peer("torch float32", 32, partial(_torch_linear, torch.float32)),
    Peer("torch bfloat16", 16, partial(_torch_linear, torch.bfloat16)),
    Peer("torch int8 dynamic", 8, _torch_int8_linear, lacks=_no_onednn_engine),
    Peer("torch int4pack", 4, _torch_int4pack, lacks=_no_int4pack),
    Peer("onnxruntime float32", 32, partial(_ort_linear, "float"), _ONNX),
    Peer("onnxruntime int8", 8, partial(_ort_linear, "int8"), _ONNX),
    Peer("onnxruntime MatMulNBits level 4", 4, partial(_ort_linear, "128:4"), _ONNX),
    Peer("onnxruntime MatMulNBits level 0", 4, partial(_ort_linear, "128:0"), _ONNX),
    Peer("OpenVINO float32", 32, partial(_openvino_linear, "f32"), _OPENVINO),
    Peer("OpenVINO int8", 8, partial(_openvino_linear, "int8"), _OPENVINO),
    Peer("OpenVINO int4", 4, partial(_openvino_linear, "int4"), _OPENVINO),
    Peer("bitsandbytes NF4", 4, _bitsandbytes, ("bitsandbytes",)),
    Peer("ggml q4_0", 4, _ggml_linear, lacks=_no_ggml),
)

CONV_PEERS = (
    Peer("torch float32", 32, partial(_torch_conv, torch.float32)),
    Peer("torch bfloat16", 16, partial(_torch_conv, torch.bfloat16)),
    Peer("torch int8", 8, _torch_int8_conv, lacks=_no_onednn_engine),
    Peer("onnxruntime float32", 32, partial(_ort_conv, False), _ONNX),
    Peer("onnxruntime int8", 8, partial(_ort_conv, True), _ONNX),
    Peer("OpenVINO float32", 32, partial(_openvino_conv, "f32"), _OPENVINO),
    Peer("OpenVINO int8", 8, partial(_openvino_conv, "int8"), _OPENVINO),
)

NETWORK_PEERS = (
    Peer("torch float32", 32, partial(_torch_network, torch.float32)),
    Peer("torch bfloat16", 16, partial(_torch_network, torch.bfloat16)),
    Peer("onnxruntime float32", 32, partial(_ort_network, False), _ONNX),
    Peer("onnxruntime int8", 8, partial(_ort_network, True), _ONNX),
    Peer("OpenVINO float32", 32, partial(_openvino_network, "f32"), _OPENVINO),
    Peer("OpenVINO bfloat16", 16, partial(_openvino_network, "bf16"), _OPENVINO),
    Peer("OpenVINO int8", 8, partial(_openvino_network, "int8"), _OPENVINO),
)
