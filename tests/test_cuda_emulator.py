"""The emulator sees what it is there for: each barrier, wait and predicate of the kernels, when it is
taken away, makes some test fail; so does a read beyond a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from emulator import MUTATIONS, SEEDS, Emulator, emulator
from shapes import layer
from test_cuda_ops import ALIGNED, Backend, check_conv, check_linear, operands

Case = Callable[[Backend], None]
LAST = (torch.channels_last,)


def on(case: Case, major: int = 8, multiprocessors: int = 6) -> Case:
    """The case on another GPU: fewer multiprocessors want larger tiles, Hopper has warpgroup instructions."""

    def run(backend: Backend) -> None:
        assert backend.emulator is not None
        with pytest.MonkeyPatch.context() as patch, backend.emulator.device(major, multiprocessors):
            patch.setenv("CORA_WARPGROUPS", "1")
            case(backend)

    return run


# Together they pass every barrier, wait and predicate of the kernels.
CASES: tuple[Case, ...] = (
    lambda b: check_linear(b, 1, 24, 2048, rank=20),  # K split
    lambda b: check_linear(b, 17, 40, 512, rank=20, groups=4),
    lambda b: check_linear(b, 100, 136, 192, rank=16),  # fused adapter
    lambda b: check_linear(b, 256, 136, 72, rank=20),  # merged
    lambda b: check_conv(b, ALIGNED["3x3"], torch.float16, formats=LAST, rank=20),
    lambda b: check_conv(b, ALIGNED["3x3"], torch.float32, formats=LAST, rank=20, x_bits=8),
    lambda b: check_linear(b, 40, 45, 208, rank=40, dtype=torch.float32, x_bits=8),
    lambda b: check_linear(b, 3, 24, 4096, rank=5, dtype=torch.float32, x_bits=8),
    lambda b: check_linear(b, 40, 45, 256, rank=5, dtype=torch.float32, x_bits=8, groups=4),
    on(lambda b: check_linear(b, 100, 136, 1088, rank=20, dtype=torch.float32, x_bits=8), 9, 1),
    on(lambda b: check_linear(b, 60, 72, 832, 8, rank=40, dtype=torch.float32, x_bits=8), 9, 1),
    on(lambda b: check_linear(b, 1, 650, 2048, rank=20), multiprocessors=2),  # tiles shared
    on(lambda b: check_linear(b, 20, 520, 4096, rank=20, dtype=torch.float32, x_bits=8), 8, 3),
)


def failure(emulated: Emulator, seed: int) -> str | None:
    """What goes wrong first when the cases run in this order of execution."""
    emulated.seed(seed)
    for i, case in enumerate(CASES):
        torch.manual_seed(5)
        try:
            case(Backend("emulated", "cpu", emulated.ops, emulated))
        except (AssertionError, RuntimeError) as error:
            return f"case {i}: {error}"
    return None


@pytest.fixture(scope="module")
def passed() -> Iterator[Emulator]:
    """The emulator after every case has run as it should."""
    emulated = emulator()
    for seed in SEEDS:
        assert failure(emulated, seed) is None
    yield emulated


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_taken_away_is_missed(passed: Emulator, mutation: str) -> None:
    sites = passed.sites(mutation)
    assert sites
    for site in sites:
        with passed.mutated(mutation, site):
            seen = any(failure(passed, seed) for seed in SEEDS)
        assert seen, f"{site}: nothing sees that its {mutation} is missing"


def test_the_order_of_execution_is_drawn(passed: Emulator) -> None:
    """Some barrier's absence shows in some orders only: one seed would not be enough."""

    def mixed(site: str) -> bool:
        with passed.mutated("barrier", site):
            return len({failure(passed, seed) is None for seed in SEEDS}) == 2

    assert any(mixed(site) for site in passed.sites("barrier"))


@pytest.mark.parametrize("channels", [18, 20, 48])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_merged_filters_stay_within_their_tensors(bits: int, channels: int) -> None:
    emulated = emulator()
    item = layer(45, channels * 9, bits, rank=20, bias=False)
    x = torch.randn(2, channels, 24, 24).half()
    window = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    args = [x, *item.args(), *window, *operands(item)]
    with emulated.device(8, 1):
        emulated.forget_sites()
        with emulated.guarded([a for a in args[1:] if isinstance(a, torch.Tensor)]):
            emulated.ops.conv2d_lowrank.default(*args)
    assert all(site.startswith("merge.cu") for site in emulated.sites("barrier"))


@pytest.mark.parametrize("x_bits", [0, 8])
@pytest.mark.parametrize("m,k", [(1, 64), (20, 64), (100, 64), (3, 2048), (40, 4096)])
def test_kernels_stay_within_their_tensors(m: int, k: int, x_bits: int) -> None:
    """And within what the op allocates for partial sums (the long ones are split)."""
    emulated = emulator()
    item = layer(45, k, 4, rank=5, x_bits=x_bits)
    args = [torch.randn(m, k).half(), *item.args(), *operands(item)]
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    with emulated.guarded(tensors):
        emulated.ops.linear_lowrank.default(*args)
    if x_bits:  # x is read by plain loads there
        return
    # The guard is no sieve: the same call without x among the tensors fails.
    with (
        emulated.guarded(tensors[1:]),
        pytest.raises(RuntimeError, match="outside every registered"),
    ):
        emulated.ops.linear_lowrank.default(*args)
