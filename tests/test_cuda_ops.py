"""The CUDA ops against the oracles: their own sources on the emulator, with four orders of execution,
and the compiled kernels where there is a GPU. The parametrisation is the same.

Errors are measured as ||got - want|| / ||want|| against the oracle in float64: 1e-3 for float16, 6e-3
for bfloat16, whose weights the kernels round once. Integers match exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulator import ROOT, SEEDS, Emulator, emulator
from shapes import CONVOLUTIONS, Layer, layer, qparams
from torch import Tensor

from cora import gpu, ops, reference

HAS_CUDA = torch.cuda.is_available()
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-5}


@dataclass
class Backend:
    """Where the CUDA ops run."""

    name: str
    device: str
    ops: Any
    emulator: Emulator | None

    def __call__(self, op: str, *args: Any) -> Any:
        """Calls an op with CPU arguments; the results are on the CPU, and the same a second time."""
        moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in args]
        results = [getattr(self.ops, op).default(*moved) for _ in range(2)]
        first, second = (r if isinstance(r, tuple) else (r,) for r in results)
        for one, two in zip(first, second, strict=True):
            assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0)), "not the same twice"
        on_cpu = tuple(r.cpu() for r in first)
        return on_cpu if isinstance(results[0], tuple) else on_cpu[0]


@pytest.fixture(
    params=[
        *(f"emulated-{s}" for s in SEEDS),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "cuda":
        if not HAS_CUDA:
            pytest.skip("no CUDA device")
        # What has no fused kernel ends in torch's operators, held here to float32's bound.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield Backend("cuda", "cuda", torch.ops.cora, None)
        return
    emulated = emulator()
    emulated.seed(int(request.param.removeprefix("emulated-")))
    yield Backend(request.param, "cpu", emulated.ops, emulated)


def error(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        assert got.shape == want.shape
        return 0.0
    assert bool(got.isfinite().all())
    difference = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    return float(difference)


def operands(item: Layer) -> tuple[Any, ...]:
    o = item.options
    names = ("a", "b", "adapter_scale", "bias", "x_scale", "x_zero_point")
    return (*(o.get(name) for name in names), o["x_bits"])


def check_linear(
    backend: Callable[..., Any],
    m: int,
    n: int,
    k: int,
    bits: int = 4,
    dtype: torch.dtype = torch.float16,
    **options: Any,
) -> None:
    item = layer(n, k, bits, **options)
    x = torch.randn(m, k).to(dtype)
    want = reference.linear_lowrank(
        x.float() if item.options["x_bits"] else x.double(), *item.args(), **item.options
    )
    got = backend("linear_lowrank", x, *item.args(), *operands(item))
    assert got.dtype == dtype
    assert got.shape == want.shape
    # B sees the hidden values rounded to tf32 when x is quantized.
    bound = BOUNDS[dtype] if not item.options["x_bits"] else max(BOUNDS[dtype], 1e-3)
    assert error(got, want) <= bound


# --- Linear --------------------------------------------------------------------------------------

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@HALVES
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_linear_bits(backend: Backend, bits: int, dtype: torch.dtype) -> None:
    for m in (1, 17):
        check_linear(backend, m, 40, 128, bits, dtype, rank=7)


@HALVES
@pytest.mark.parametrize("rank", [0, 16, 80])
@pytest.mark.parametrize("m", [1, 7, 17, 63, 100])
def test_linear_rows_and_ranks(backend: Backend, m: int, rank: int, dtype: torch.dtype) -> None:
    check_linear(backend, m, 136, 192, dtype=dtype, rank=rank)


@pytest.mark.parametrize(
    "m,n,k", [(1, 1, 8), (3, 17, 24), (9, 130, 77), (20, 33, 5), (130, 30, 40)]
)
def test_linear_ragged(backend: Backend, m: int, n: int, k: int) -> None:
    check_linear(backend, m, n, k, rank=3 if min(n, k) > 3 else 0)


@HALVES
def test_linear_splits_k(backend: Backend, dtype: torch.dtype) -> None:
    """Few channels and a long sum: blocks share K, and add up in a fixed order."""
    for m in (1, 40):
        check_linear(backend, m, 24, 2048, dtype=dtype, rank=20)


@pytest.mark.parametrize(
    "m,n,x_bits,multiprocessors",
    [(1, 650, 0, 2), (40, 520, 0, 2), (100, 520, 0, 4), (20, 520, 8, 3), (128, 520, 8, 3)],
)
def test_blocks_share_tiles(
    backend: Backend, m: int, n: int, x_bits: int, multiprocessors: int
) -> None:
    """Tiles that would leave half of the last round idle: a block computes the end of one and the
    beginning of the next. On a GPU the same call runs as its size wants."""
    dtype = torch.float32 if x_bits else torch.float16
    k = 4096 if x_bits else 2048
    emulated = backend.emulator
    with emulated.device(8, multiprocessors) if emulated else nullcontext():
        if emulated:
            emulated.forget_sites()
        check_linear(backend, m, n, k, dtype=dtype, rank=20, x_bits=x_bits)
    if emulated:
        assert between_tiles() in emulated.sites("barrier")


def between_tiles() -> str:
    """The barrier that a block passes only on the way to another tile."""
    lines = (ROOT / "csrc" / "cuda" / "gemm.cuh").read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if "shared memory is the next tile's" in line]
    return f"gemm.cuh:{found[0]}"


@HALVES
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows,groups", [(1, 1), (40, 2), (40, 4), (40, 16), (1, 8)])
def test_linear_scale_groups(
    backend: Backend, rows: int, groups: int, bits: int, dtype: torch.dtype
) -> None:
    check_linear(backend, 5, 40, 256, bits, dtype, rows=rows, groups=groups, rank=3)


def test_linear_scale_groups_of_a_few_inputs(backend: Backend) -> None:
    """Groups that the fused kernels do not take."""
    check_linear(backend, 5, 20, 60, groups=12, rank=3)


@pytest.mark.parametrize("adapter", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linear_float_adapters(backend: Backend, adapter: torch.dtype) -> None:
    check_linear(backend, 5, 20, 64, adapter=adapter, rank=3)


def test_linear_rank_above_the_compiled_one(backend: Backend) -> None:
    check_linear(backend, 3, 300, 304, rank=290)


@HALVES
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_linear_many_rows(backend: Backend, bits: int, dtype: torch.dtype) -> None:
    """The merged weight and torch's product."""
    check_linear(backend, 256, 40, 72, bits, dtype, rank=20)
    check_linear(backend, 257, 130, 96, bits, dtype, rank=0, groups=2)
    check_linear(backend, 257, 130, 30, bits, dtype, rank=3)


def test_linear_float32(backend: Backend) -> None:
    check_linear(backend, 5, 30, 77, dtype=torch.float32, rank=3)


def test_autocast(backend: Backend) -> None:
    """Under it torch's operators return another type than they are given; the op does not."""
    item = layer(30, 77, 4, rank=3)
    x = torch.randn(5, 77)
    want = reference.linear_lowrank(x.double(), *item.args(), **item.options)
    with torch.autocast(backend.device, torch.bfloat16):
        got = backend("linear_lowrank", x, *item.args(), *operands(item))
    assert got.dtype == torch.float32
    assert error(got, want) <= BOUNDS[torch.bfloat16]


@HALVES
def test_linear_far_zero_points(backend: Backend, dtype: torch.dtype) -> None:
    """Relative to |x| |W|, whose sum hides in the others': the weights are nearly constant."""
    item = layer(24, 64, 4, far=True)
    x = torch.rand(3, 64).to(dtype)
    want = reference.linear_lowrank(x.double(), *item.args(), **item.options)
    got = backend("linear_lowrank", x.abs(), *item.args(), *operands(item))
    limit = torch.finfo(dtype).max
    inside = want.abs() < limit
    assert error(got[inside], want[inside]) <= 2 * BOUNDS[dtype]


def test_linear_leading_dimensions_and_strides(backend: Backend) -> None:
    item = layer(18, 40, rank=3)
    for x in (torch.randn(2, 3, 5, 40), torch.randn(40), torch.randn(40, 6).T, torch.randn(0, 40)):
        x = x.half()
        want = reference.linear_lowrank(x.double(), *item.args(), **item.options)
        got = backend("linear_lowrank", x, *item.args(), *operands(item))
        assert error(got, want) <= BOUNDS[torch.float16]


# --- Linear on 8-bit inputs ----------------------------------------------------------------------


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_linear_integers_are_exact(backend: Backend, bits: int, groups: int, far: bool) -> None:
    """With scales of 1 the result is the integer sum itself, zero-points of any size included."""
    for m in (3, 40):
        n, k = 40, 192
        scale = torch.ones(n, groups)
        zero_point = qparams(n, groups, bits)[1] - (2**9 if far else 0)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        x = torch.randint(-90, 160, (m, k)).float()
        quantizer = (torch.ones(1), torch.tensor([90], dtype=torch.int32), 8)
        got = backend(
            "linear_lowrank", x, ops.pack_bits(codes, bits), scale, zero_point, bits,
            None, None, None, None, *quantizer,
        )  # fmt: skip
        weight = codes.long() - zero_point.long().repeat_interleave(k // groups, 1)
        assert torch.equal(got, (x.long() @ weight.T).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["dynamic8", "static8", "dynamic4"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_linear_quantized_inputs(
    backend: Backend, bits: int, mode: str, dtype: torch.dtype
) -> None:
    options = {"x_bits": int(mode[-1]), "static": mode.startswith("static")}
    for m, rank in ((3, 0), (20, 9), (70, 40)):
        check_linear(backend, m, 45, 96, bits, dtype, rank=rank, **options)


def test_linear_quantized_inputs_large_rank(backend: Backend) -> None:
    check_linear(backend, 40, 45, 208, rank=40, dtype=torch.float32, x_bits=8)
    check_linear(backend, 40, 200, 208, rank=190, dtype=torch.float32, x_bits=8)


def test_linear_quantized_inputs_split_k(backend: Backend) -> None:
    check_linear(backend, 3, 24, 4096, rank=5, dtype=torch.float32, x_bits=8)


# --- Convolution ---------------------------------------------------------------------------------


def check_conv(
    backend: Callable[..., Any],
    geometry: tuple[Any, ...],
    dtype: torch.dtype,
    bits: int = 4,
    *,
    rank: int = 2,
    scale_groups: int = 1,
    formats: tuple[torch.memory_format, ...] = (torch.contiguous_format, torch.channels_last),
    **options: Any,
) -> None:
    batch, cg, h, w, ng, groups, kernel, *window = geometry
    k = cg * kernel[0] * kernel[1]
    item = layer(
        ng * groups,
        k,
        bits,
        rank=min(rank, ng, k),
        conv_groups=groups,
        groups=scale_groups,
        **options,
    )
    x = torch.randn(batch, cg * groups, h, w).to(dtype)
    quantized = bool(item.options["x_bits"])
    want = reference.conv2d_lowrank(
        x.float() if quantized else x.double(),
        *item.args(),
        kernel,
        *window,
        groups,
        **item.options,
    )
    for memory_format in formats:
        laid = x.to(memory_format=memory_format)
        got = backend(
            "conv2d_lowrank", laid, *item.args(), kernel, *window, groups, *operands(item)
        )
        assert got.is_contiguous(memory_format=memory_format)
        assert got.dtype == dtype
        assert error(got, want) <= max(BOUNDS[dtype], 1e-3 if quantized else 0)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("mode", ["float16", "bfloat16", "float32", "dynamic8", "static8"])
def test_conv(backend: Backend, name: str, mode: str) -> None:
    dtype = getattr(torch, mode, torch.float32)
    options = {"x_bits": 8, "static": mode == "static8"} if mode.endswith("8") else {}
    check_conv(backend, CONVOLUTIONS[name], dtype, **options)


ALIGNED = {
    "3x3": (1, 32, 9, 9, 40, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "strided": (2, 16, 10, 13, 24, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    "dilated": (1, 48, 12, 9, 16, 1, (3, 3), (1, 1), (2, 2), (2, 2)),
    "wide": (1, 16, 6, 11, 40, 1, (1, 5), (1, 2), (0, 2), (1, 1)),
    "1x1": (3, 64, 7, 5, 130, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
}


@pytest.mark.parametrize("rank", [0, 2, 20, 40, 100])
@pytest.mark.parametrize("mode", ["float16", "bfloat16", "static8"])
def test_conv_reads_channels_last_in_place(backend: Backend, mode: str, rank: int) -> None:
    dtype = getattr(torch, mode, torch.float32)
    options = {"x_bits": 8, "static": True} if mode == "static8" else {}
    for name in ("3x3", "1x1") if rank else ALIGNED:
        check_conv(
            backend, ALIGNED[name], dtype, rank=rank, formats=(torch.channels_last,), **options
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("mode", ["float16", "bfloat16", "dynamic8"])
def test_conv_bits(backend: Backend, bits: int, mode: str) -> None:
    dtype = getattr(torch, mode, torch.float32)
    options = {"x_bits": 8} if mode == "dynamic8" else {}
    check_conv(backend, ALIGNED["strided"], dtype, bits, formats=(torch.channels_last,), **options)


@pytest.mark.parametrize("groups", [2, 9, 144])
@pytest.mark.parametrize("mode", ["float16", "dynamic8"])
def test_conv_scale_groups(backend: Backend, groups: int, mode: str) -> None:
    """Two groups hold whole channels; the others cut through their taps, and are merged."""
    dtype = getattr(torch, mode, torch.float32)
    options = {"x_bits": 8} if mode == "dynamic8" else {}
    geometry = CONVOLUTIONS["3x3"] if groups != 2 else ALIGNED["3x3"]
    check_conv(backend, geometry, dtype, scale_groups=groups, **options)


# --- Many pixels of 16-bit inputs: the merged weight and torch's convolution --------------------------


@dataclass
class Merged:
    """Calls an op, and sees that it went through the merged weight, by tiles."""

    backend: Backend

    def __call__(self, *args: Any) -> Tensor:
        emulated = self.backend.emulator
        if emulated is not None:
            emulated.forget_sites()
        result = self.backend(*args)
        if emulated is not None:
            sites = emulated.sites("barrier")
            assert sites and all(s.startswith("merge.cu") for s in sites)
        return result

    def many(self, geometry: tuple[Any, ...], size: int = 24) -> tuple[Any, ...]:
        """So many pixels that merging pays on the emulated GPU of one multiprocessor; more on a real one."""
        _, channels, _, _, *rest = geometry
        batch = 2 if self.backend.emulator is not None else size**2 // 11
        return (batch, channels, size, size, *rest)


@pytest.fixture
def merged(backend: Backend) -> Iterator[Merged]:
    with backend.emulator.device(8, 1) if backend.emulator is not None else nullcontext():
        yield Merged(backend)


@HALVES
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_merged_convolution_bits(merged: Merged, bits: int, dtype: torch.dtype) -> None:
    """Both memory formats of x: the weight is channels-last for either."""
    check_conv(merged, merged.many(ALIGNED["3x3"]), dtype, bits, rank=20)


@pytest.mark.parametrize("rank", [0, 3, 40])
@pytest.mark.parametrize("channels", [3, 18, 20, 24, 72])
def test_merged_convolution_ragged_channels(merged: Merged, channels: int, rank: int) -> None:
    """Taps padded to 16 channels, and rows of filters that no vector of four fits."""
    geometry = (1, channels, 9, 9, 150, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    check_conv(merged, merged.many(geometry), torch.float16, rank=rank)


@pytest.mark.parametrize("rank", [0, 20])
@pytest.mark.parametrize("groups", [2, 3, 6])
def test_merged_convolution_scale_groups(merged: Merged, groups: int, rank: int) -> None:
    geometry = (1, 48, 9, 9, 40, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    check_conv(merged, merged.many(geometry), torch.float16, scale_groups=groups, rank=rank)


@pytest.mark.parametrize("name", ["strided", "dilated", "wide", "1x1"])
def test_merged_convolution_windows(merged: Merged, name: str) -> None:
    check_conv(merged, merged.many(ALIGNED[name], 40), torch.float16, rank=20)


@pytest.mark.parametrize("channels", [40, 36])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epilogue", ["", "relu", "add", "add relu", "codes"])
def test_merged_convolution_epilogues(
    merged: Merged, epilogue: str, bias: bool, channels: int
) -> None:
    """Finished in place, elsewhere, or not at all."""
    geometry = merged.many((1, 32, 9, 9, channels, 1, (3, 3), (1, 1), (1, 1), (1, 1)))
    batch, c, h, w, n, _, *window = geometry
    item = layer(n, c * 9, 4, rank=5)
    o = {**item.options, "bias": item.options["bias"] if bias else None}
    parts = (o["a"], o["b"], o["adapter_scale"], o["bias"])
    prepared = merged.backend("prepare_layer", *item.args(), c, *window, 1, *parts)
    known = ops.layer_geometry(item.weight, item.scale, 4, c, *window, 1, o["b"], bias)
    x = torch.randn(batch, c, h, w).half()
    added = torch.randn(batch, n, h, w).half() if "add" in epilogue else None
    low = 0.0 if "relu" in epilogue else -float("inf")
    codes = (0.1, 90) if epilogue == "codes" else (None, 0)
    want = reference.conv2d_lowrank(x.double(), *item.args(), *window, 1, **o)
    want = (want if added is None else want + added.double()).clamp(min=low)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        laid, more = (None if t is None else t.to(memory_format=memory_format) for t in (x, added))
        got = merged(
            "run_layer", laid, prepared, known, None, 0, 0, 0,
            more, 1.0, 0, 0, low, float("inf"), *codes, 1 if epilogue == "codes" else 0,
        )  # fmt: skip
        if epilogue == "codes":
            wanted = (want / 0.1).round().add(90).clamp(0, 255)
            assert (got[:, :, 1:-1, 1:-1].double() - wanted).abs().max() <= 1
        else:
            assert got.is_contiguous(memory_format=memory_format)
            assert error(got, want) <= 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_merged_linear_epilogues(backend: Backend, relu: bool, bias: bool) -> None:
    item = layer(40, 72, 4, rank=20)
    o = {**item.options, "bias": item.options["bias"] if bias else None}
    window: tuple[Any, ...] = ([], [], [], [], 1)
    parts = (o["a"], o["b"], o["adapter_scale"], o["bias"])
    prepared = backend("prepare_layer", *item.args(), 72, *window, *parts)
    geometry = ops.layer_geometry(item.weight, item.scale, 4, 72, b=o["b"], bias=bias)
    x = torch.randn(260, 72).half()
    low = 0.0 if relu else -float("inf")
    want = reference.linear_lowrank(x.double(), *item.args(), **o).clamp(min=low)
    got = backend(
        "run_layer", x, prepared, geometry, None, 0, 0, 0,
        None, 1.0, 0, 0, low, float("inf"), None, 0, 0,
    )  # fmt: skip
    assert error(got, want) <= 1e-3


# --- Many rows of 8-bit inputs: large tiles, warpgroup instructions (sm_90a) --------------------------


@dataclass
class Both:
    """Calls an op with and without warpgroup instructions; integers are exact, so the results are the
    same bits."""

    backend: Backend
    patch: pytest.MonkeyPatch

    def __call__(self, *args: Any) -> Tensor:
        emulated = self.backend.emulator
        self.patch.setenv("CORA_WARPGROUPS", "0")
        without = self.backend(*args)
        self.patch.setenv("CORA_WARPGROUPS", "1")
        if emulated is not None:
            emulated.forget_sites()
        by_warpgroups = self.backend(*args)
        if emulated is not None:
            # Two waits for copies, two for instructions, one for t of a pass of its own; no other GEMM ran.
            waits = [s for s in emulated.sites("wait") if s.startswith("gemm")]
            assert len(waits) in (4, 5)
            assert all(s.startswith("gemm_warpgroups") for s in waits)
        assert torch.equal(by_warpgroups, without)
        return by_warpgroups

    def rows(self, count: int) -> int:
        """So many that the large tiles are chosen on the emulated GPU; many more on a real one."""
        return count if self.backend.emulator is not None else 160 * count


@pytest.fixture
def both(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    emulated = backend.emulator
    if emulated is None and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("warpgroup instructions are of compute capability 9.0")
    with emulated.device(9, 1) if emulated is not None else nullcontext():
        yield Both(backend, monkeypatch)


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_large_tiles_are_exact(both: Both, bits: int, far: bool) -> None:
    for m, n, k in ((100, 150, 330), (200, 40, 192)):
        zero_point = qparams(n, 1, bits)[1] - (2**9 if far else 0)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        x = torch.randint(-90, 160, (both.rows(m), k)).float()
        quantizer = (torch.ones(1), torch.tensor([90], dtype=torch.int32), 8)
        got = both(
            "linear_lowrank", x, ops.pack_bits(codes, bits), torch.ones(n, 1), zero_point, bits,
            None, None, None, None, *quantizer,
        )  # fmt: skip
        weight = codes.double() - zero_point.double()
        assert torch.equal(got, (x.double() @ weight.T).float())


@pytest.mark.parametrize("rank", [0, 2, 20, 40, 100])
@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_large_tiles_convolve(both: Both, name: str, rank: int) -> None:
    batch, *rest = ALIGNED[name]
    check_conv(
        both, (both.rows(batch), *rest), torch.float32, rank=rank,
        formats=(torch.channels_last,), x_bits=8, static=True,
    )  # fmt: skip


def test_large_tiles_are_shared(both: Both) -> None:
    emulated = both.backend.emulator
    with emulated.device(9, 3) if emulated else nullcontext():
        check_linear(both, 128, 520, 4096, rank=20, dtype=torch.float32, x_bits=8)
        if emulated:
            assert between_tiles() in emulated.sites("barrier")


# --- Prepared layers -----------------------------------------------------------------------------


def quantized_image(shape: tuple[int, ...], halo: int, zero: int) -> Tensor:
    """Codes, channels_last, with a border of the zero-point."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    padded = torch.nn.functional.pad(codes, (halo,) * 4, value=zero)
    return padded.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [32, 20])
@pytest.mark.parametrize(
    "x_halo,out_halo,add", [(0, 0, ""), (1, 2, "codes"), (2, 0, "float"), (1, 1, "")]
)
def test_run_layer_between_codes(
    backend: Backend, channels: int, x_halo: int, out_halo: int, add: str
) -> None:
    """Codes in, codes out: border, residual and clamp in one call, as in a chain of layers."""
    n, h, w = 24, 6, 5
    item = layer(n, channels * 9, 4, rank=5)
    o = item.options
    window: tuple[Any, ...] = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    prepared = backend(
        "prepare_layer",
        *item.args(),
        channels,
        *window,
        o["a"],
        o["b"],
        o["adapter_scale"],
        o["bias"],
    )
    geometry = ops.layer_geometry(item.weight, item.scale, 4, channels, *window, o["b"])
    x_scale, x_zero = 0.02, 100
    x = quantized_image((2, channels, h, w), x_halo, x_zero)
    inner = x[:, :, x_halo : h + x_halo, x_halo : w + x_halo].double()
    real = x_scale * (inner - x_zero)
    want = reference.conv2d_lowrank(
        real,
        *item.args(),
        *window,
        a=o["a"],
        b=o["b"],
        adapter_scale=o["adapter_scale"],
        bias=o["bias"],
    )
    added = None
    if add == "codes":
        added = quantized_image((2, n, h, w), 1, 7)
        want = want + 0.03 * (added[:, :, 1:-1, 1:-1].double() - 7)
    elif add == "float":
        added = torch.randn(2, n, h, w).to(memory_format=torch.channels_last)
        want = want + added.double()
    want = want.clamp(min=0.0)
    clamp = (0.0, float("inf"))
    added_args = (added, 0.03, 7, 1 if add == "codes" else 0)

    got = backend(
        "run_layer",
        x,
        prepared,
        geometry,
        x_scale,
        x_zero,
        8,
        x_halo,
        *added_args,
        *clamp,
        None,
        0,
        0,
    )
    assert got.dtype == torch.float32
    assert error(got, want) <= 1e-3

    scale, zero = float(want.max()) / 200, 3
    codes = backend(
        "run_layer",
        x,
        prepared,
        geometry,
        x_scale,
        x_zero,
        8,
        x_halo,
        *added_args,
        *clamp,
        scale,
        zero,
        out_halo,
    )
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous(memory_format=torch.channels_last)
    border = codes.clone()
    border[:, :, out_halo : h + out_halo, out_halo : w + out_halo] = zero
    assert bool((border == zero).all())
    interior = codes[:, :, out_halo : h + out_halo, out_halo : w + out_halo]
    wanted = (want / scale).round().add(zero).clamp(0, 255)
    assert (interior.double() - wanted).abs().max() <= 1


def test_run_layer_linear_with_clamp(backend: Backend) -> None:
    item = layer(24, 64, 4, rank=5)
    o = item.options
    prepared = backend(
        "prepare_layer",
        *item.args(),
        64,
        [],
        [],
        [],
        [],
        1,
        o["a"],
        o["b"],
        o["adapter_scale"],
        o["bias"],
    )
    geometry = ops.layer_geometry(item.weight, item.scale, 4, 64, b=o["b"])
    x = torch.randn(3, 5, 64).half()
    added = torch.randn(3, 5, 24).half()
    got = backend(
        "run_layer", x, prepared, geometry, None, 0, 0, 0, added, 1.0, 0, 0, 0.0, 6.0, None, 0, 0
    )
    want = reference.linear_lowrank(x.double(), *item.args(), **o) + added.double()
    assert error(got, want.clamp(0, 6)) <= 1e-3


# --- Quantizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape,rows,groups",
    [
        ((40, 64), 40, 1),
        ((40, 64), 40, 4),
        ((7, 33), 7, 1),
        ((7, 30), 1, 5),
        ((5, 3, 3, 3), 5, 1),
        ((5000,), 1, 1),
    ],
)
def test_fake_quantize(
    backend: Backend, shape: tuple[int, ...], rows: int, groups: int, dtype: torch.dtype
) -> None:
    scale, zero_point = qparams(rows, groups, 4)
    x = (torch.randn(shape) * 0.5).to(dtype)
    got = backend("fake_quantize", x, scale, zero_point, 4, True, True)
    want = reference.fake_quantize(x, scale, zero_point, 4, residual=True, codes=True)
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape,rows,groups", [((40, 64), 40, 1), ((6, 30), 1, 5), ((6, 5000), 1, 1), ((3, 4100), 3, 2)]
)
def test_fake_quantize_backward(
    backend: Backend, shape: tuple[int, ...], rows: int, groups: int, dtype: torch.dtype
) -> None:
    scale, zero_point = qparams(rows, groups, 4)
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    grad_x, grad_scale = backend("fake_quantize_backward", grad, x, scale, zero_point, 4)
    want_x, want_scale = torch.ops.cora.fake_quantize_backward(grad, x, scale, zero_point, 4)
    assert torch.equal(grad_x, want_x)
    assert torch.allclose(grad_scale, want_scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing(backend: Backend, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 77), dtype=torch.uint8)
    packed = backend("pack_bits", codes, bits)
    assert torch.equal(packed, reference.pack_bits(codes, bits))
    assert torch.equal(backend("unpack_bits", packed, bits, 77), codes)
    scale, zero_point = qparams(3, 7, bits)
    want = reference.dequantize_packed(packed, scale, zero_point, bits, 77)
    assert torch.equal(backend("dequantize_packed", packed, scale, zero_point, bits, 77), want)


@pytest.mark.parametrize("shape,halo", [((2, 20, 5, 4), 0), ((2, 20, 5, 4), 2), ((7, 9), 0)])
def test_activation_codes(backend: Backend, shape: tuple[int, ...], halo: int) -> None:
    x = torch.randn(shape)
    codes = backend("quantize_activation", x, 0.02, 90, 8, halo)
    want = torch.ops.cora.quantize_activation(x, 0.02, 90, 8, halo)
    assert torch.equal(codes, want)
    assert codes.stride() == want.stride()
    values = backend("dequantize_activation", codes, 0.02, 90, halo)
    assert torch.equal(values, torch.ops.cora.dequantize_activation(codes, 0.02, 90, halo))


# --- What torch's operators do on a GPU ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (8, 8)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_factors_in_plain_torch(shape: tuple[int, int], groups: int, weighted: bool) -> None:
    residual = torch.randn(shape)
    k = shape[1]
    samples = torch.randn(groups, 3 * k, k)
    moment = samples.mT @ samples / (3 * k) if weighted else None
    got = gpu.lowrank_factors(residual, 3, groups, moment)
    want = reference.lowrank_factors(residual, 3, groups, moment)
    for one, two in zip(got, want, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def test_factors_of_a_deficient_residual() -> None:
    residual = torch.randn(10, 2) @ torch.randn(2, 20)
    a, b, _ = gpu.lowrank_factors(residual, 5, 1, None)
    assert torch.allclose(b @ a, residual, atol=1e-5)
    assert bool(a.isfinite().all() & b.isfinite().all())


def test_errors_of_candidates_in_plain_torch() -> None:
    x = torch.randn(6, 20)
    for rows, groups in ((6, 1), (6, 4), (1, 5)):
        scale, zero_point = (
            torch.stack(list(p))
            for p in zip(*(qparams(rows, groups, 3) for _ in range(4)), strict=True)
        )
        got = gpu.quantization_error(x, scale, zero_point, 3)
        want = reference.quantization_error(x, scale, zero_point, 3)
        assert torch.allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 40, 64), (3, 7, 31), (2, 0, 5), (2, 3, 0)])
def test_descent_in_plain_torch(shape: tuple[int, int, int]) -> None:
    groups, n, k = shape
    codes = torch.randint(0, 8, shape).double()
    gradient, scale = torch.randn(2, *shape, dtype=torch.float64)
    curvature = torch.eye(k).double() + 0.1 * torch.rand(groups, k, k, dtype=torch.float64)
    args = codes, gradient, scale.abs() + 0.1, curvature, 3
    assert torch.equal(gpu.descend_codes(*args), reference.descend_codes(*args))


@pytest.mark.parametrize(
    "n,k,groups", [(40, 300, 1), (42, 140, 3), (30, 9, 30), (0, 5, 1), (4, 0, 2)]
)
def test_error_feedback_in_plain_torch(n: int, k: int, groups: int) -> None:
    """Sums in another order: a value between two codes may go to either."""
    samples = torch.randn(groups, 2 * k + 8, k, dtype=torch.float64)
    samples[:, :, 1:] += samples[:, :, :-1]
    order = torch.stack([torch.randperm(k) for _ in range(groups)])
    moment = samples.mT @ samples
    ordered = torch.stack([m[o][:, o] for m, o in zip(moment, order, strict=True)])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    for rows, runs in ((1, 1), (n, 1), (n, max(k, 1)), (1, max(k, 1))):
        quantizer = qparams(rows, runs, 4)
        x = torch.randn(n, k)
        codes, errors = gpu.error_feedback(x, *quantizer, 4, factor, order)
        want, want_errors = reference.error_feedback(x, *quantizer, 4, factor, order)
        assert (codes.dtype, codes.shape, errors.dtype) == (want.dtype, want.shape, torch.float64)
        assert (codes != want).sum() <= 0.01 * want.numel()
        assert (errors.sum() - want_errors.sum()).abs() <= 0.01 * want_errors.sum()


def test_pooling_in_plain_torch() -> None:
    x = quantized_image((2, 5, 9, 8), 1, 3)
    window = ([3, 3], [2, 2], [1, 1], [1, 1], True)
    got = gpu.max_pool2d_codes(x, 3, 1, *window, 2)
    assert torch.equal(got, torch.ops.cora.max_pool2d_codes(x, 3, 1, *window, 2))
    mean = gpu.mean_codes(x, 0.1, 3, 1)
    assert torch.allclose(mean, torch.ops.cora.mean_codes(x, 0.1, 3, 1), rtol=1e-6)
    pixels = torch.randn(2, 5, 9, 8)
    assert torch.allclose(gpu.mean_pixels(pixels), torch.ops.cora.mean_pixels(pixels), atol=1e-6)


# --- Prepared layers are the same bytes each time --------------------------------------------------


@pytest.mark.parametrize("adapter", [torch.int8, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("n,channels,rank", [(24, 20, 5), (24, 20, 0), (5, 16, 1)])
def test_prepared_layers_are_whole(
    backend: Backend, n: int, channels: int, rank: int, bits: int, adapter: torch.dtype
) -> None:
    """Every byte is written: backend() calls twice, into memory of different garbage."""
    item = layer(n, channels * 9, bits, rank=rank, adapter=adapter)
    o = item.options
    names = ("a", "b", "adapter_scale", "bias")
    window = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    backend("prepare_layer", *item.args(), channels, *window, *(o.get(name) for name in names))


# --- The door ------------------------------------------------------------------------------------


def test_every_op_has_a_cuda_answer() -> None:
    """`model.to("cuda")` may meet any op."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cora::")]
    assert "cora::run_layer" in names
    # Called for CPU tensors only: FusedSteps runs single ops on a GPU.
    names.remove("cora::run_steps")
    missing = [
        name
        for name in names
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
    ]
    assert missing == []


def test_checks_of_cuda_only() -> None:
    """The others are in test_ops_errors.py."""
    e = emulator().ops
    item = layer(12, 32, 4, rank=3)
    x = torch.randn(2, 32).half()
    o = operands(item)
    prepared = e.prepare_layer.default(*item.args(), 32, [], [], [], [], 1, *o[:4])
    geometry = ops.layer_geometry(item.weight, item.scale, 4, 32, b=o[1])
    rest = (None, 0, 0, 0, None, 1.0, 0, 0, 0.0, 6.0, None, 0, 0)
    with pytest.raises(RuntimeError, match="layer must have shape"):
        e.run_layer.default(x, prepared[:-1], geometry, *rest)
    with pytest.raises(RuntimeError, match="geometry must have 9 or 17"):
        e.run_layer.default(x, prepared, geometry[:2], *rest)
    with pytest.raises(RuntimeError, match="codes must be <= 3"):
        e.pack_bits.default(torch.full((2, 5), 7, dtype=torch.uint8), 2)
