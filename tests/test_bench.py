"""benchmarks/: peers compute what they are compared on, contestants take turns, verdicts are right."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import machine
import peers
import resnet
import rows
import timing
import verdicts
from layers import Conv, Linear


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def present(peer: peers.Peer) -> None:
    if reason := peer.absent():
        pytest.skip(reason)


# Uniform 4-bit codes in blocks of 128 of normal weights err by a tenth, NF4 and q4_0 by less.
_ERROR = {32: 1e-5, 16: 0.01, 8: 0.03, 4: 0.16}


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("peer", peers.LINEAR_PEERS, ids=lambda peer: peer.name)
def test_linear_peers_compute_the_product(
    peer: peers.Peer, m: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present(peer)
    monkeypatch.setattr(peers, "_scratch", lambda: tmp_path)
    torch.manual_seed(0)
    x, weight = torch.randn(m, 256), torch.randn(64, 256) * 0.02
    call = peer.make(peers.LinearWork(Linear(m, 256, 64), x, (weight,)), 1)
    call()
    assert relative(peers.result(call), x @ weight.T) < _ERROR[peer.bits]


@pytest.mark.parametrize("codes", [False, True], ids=["float", "codes"])
@pytest.mark.parametrize("peer", peers.CONV_PEERS, ids=lambda peer: peer.name)
def test_conv_peers_compute_the_convolution(peer: peers.Peer, codes: bool) -> None:
    present(peer)
    shape = Conv(2, 32, 9, 48, 3)
    torch.manual_seed(0)
    x, weight, bias = torch.rand(shape.input), torch.randn(48, 32, 3, 3) * 0.1, torch.randn(48)
    call = peer.make(peers.ConvWork(shape, x, weight, bias, codes), 1)
    call()
    got, expected = peers.result(call), torch.conv2d(x, weight, bias, 1, 1)
    if codes and peer.bits == 8:
        got, expected = got * peers.OUT_SCALE, expected.clamp(0, 255 * peers.OUT_SCALE)
    assert relative(got, expected) < _ERROR[peer.bits]


@pytest.mark.parametrize("peer", peers.NETWORK_PEERS, ids=lambda peer: peer.name)
def test_network_peers_compute_the_network(
    peer: peers.Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present(peer)
    monkeypatch.setattr(peers, "_scratch", lambda: tmp_path)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    model = torch.nn.Sequential(
        resnet.Block(3, 8, 1, bottleneck=False), resnet.Block(8, 4, 2, bottleneck=True)
    ).eval()
    work = peers.NetworkWork("blocks", model, x[:2], (x,))
    with torch.no_grad():
        call = peer.make(work, 1)
        call()
        assert relative(peers.result(call), model(x[:2])) < {32: 1e-4, 16: 0.02, 8: 0.1}[peer.bits]


def test_our_contestants_compute_the_layer() -> None:
    """Codes in and out give what floats in and out give, up to the rounding of the output."""
    shape, x = Conv(1, 32, 6, 40, 3), torch.rand(1, 32, 6, 6)
    torch.manual_seed(0)
    as_float: Any = rows._our_conv(shape, 4, x, codes=False)()
    torch.manual_seed(0)
    codes: Any = rows._our_conv(shape, 4, x, codes=True)()
    inner = codes[:, :, 1:-1, 1:-1].float() * peers.OUT_SCALE
    expected = as_float.clamp(0, 255 * peers.OUT_SCALE)
    assert (inner - expected).abs().max() <= 0.51 * peers.OUT_SCALE


def test_an_absent_peer_has_a_reason() -> None:
    peer = peers.Peer("none", 4, lambda work, threads: print, ("a_module_that_is_not_there",))
    assert "a_module_that_is_not_there" in (peer.absent() or "")
    contest = rows._with_peers({}, [peer], None, 1)
    assert contest.calls == {} and list(contest.absent) == ["none"]


def test_a_failing_peer_has_a_reason() -> None:
    def make(work: Any, threads: int) -> peers.Call:
        raise ValueError("no such layer")

    contest = rows._with_peers({}, [peers.Peer("broken", 4, make)], None, 1)
    assert contest.calls == {} and "no such layer" in contest.absent["broken"]


def test_contestants_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.in_turns(calls, 0, calls_a_turn=2, least=8)
    order = order[4:]  # after two trial calls each
    turns = ["".join(order[i : i + 6]) for i in range(0, len(order), 6)]
    assert len(turns) == 8 and set(turns) == {"aaabbb", "bbbaaa"}  # one untimed, two timed
    assert len(times["a"].seconds) == len(times["b"].seconds) == 16


def test_a_call_may_know_its_time() -> None:
    times = timing.in_turns({"a": lambda: timing.Seconds(7)}, 0, calls_a_turn=1)
    assert times["a"].median == 7


def test_others_are_not_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings are made up: the kernel counts in ticks, and a busy machine pays them out in bursts."""
    readings = iter([(100.0, 10.0, 50.0), (103.5, 12.0, 52.0), (103.0, 14.0, 52.0)])
    monkeypatch.setattr(timing.Others, "_now", staticmethod(lambda: next(readings)))
    others = timing.Others()
    assert others.cores() == pytest.approx((3.5 - 2.0) / 2.0)
    assert others.cores() == 0.0  # this process alone was counted for more than the machine


def test_the_machine_is_read() -> None:
    busy, own, now = timing.Others._now()
    assert own > 0 and now > 0
    assert busy >= own or busy == 0.0  # 0: no /proc/stat here


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name, weights", [("ResNet-18", 11_689_512), ("ResNet-50", 25_557_032)])
def test_networks_are_the_known_ones(name: str, weights: int) -> None:
    with torch.device("meta"):
        model = resnet.NETWORKS[name]()
    assert sum(p.numel() for p in model.parameters()) == weights
    state = model.state_dict()
    assert {"layer2.0.downsample.0.weight", "layer4.1.bn2.running_var", "fc.bias"} <= state.keys()
    assert model(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 1000)


def test_random_network_folds_and_stays_in_range() -> None:
    x = torch.randn(8, 3, 64, 64)
    model = resnet.random_network("ResNet-18", [x])
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(resnet.fused(model)(x), expected, rtol=1e-3, atol=1e-4)
    assert 0.05 < expected.std() < 5


def test_cost_of_a_network() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Flatten(), torch.nn.Linear(128, 5)
    )
    operations, weights = rows.network_cost(model, torch.zeros(2, 3, 8, 8))
    assert (operations, weights) == (2 * 2 * (16 * 8 * 27 + 5 * 128), 8 * 27 + 5 * 128)


def record(row: str, seconds: dict[str, float], threads: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "row": row, "name": "M 1", "threads": threads, "order": 0, "seconds": seconds, "absent": {},
        "operations": 0, "bytes": 0, "facts": {}, **more,
    }  # fmt: skip


def verdict(found: list[verdicts.Verdict], against: str) -> verdicts.Verdict:
    return next(v for v in found if v.target.against == against)


def test_verdicts_of_a_linear_layer() -> None:
    seconds = {
        "cora W4A8 rank 32": 1.0,
        "torch float32": 6.0,
        "ggml q4_0": 1.5,
        "torch int4pack": 9.0,
    }
    found = verdicts.verdicts([record("linear", seconds, bytes=8e9)], {"1": {"read": 10.0}})
    assert verdict(found, "torch float32").reached == 1  # the goal itself reaches it
    assert verdict(found, "read bandwidth").values == (0.8,)
    four_bit = verdict(found, "best 4-bit peer")
    assert four_bit.values == (1.5,) and four_bit.reached == 0  # the fastest of them


def test_verdicts_need_their_peers() -> None:
    found = verdicts.verdicts([record("linear", {"cora W4A8 rank 32": 1.0}, bytes=8e9)], {})
    assert found == []


def test_a_verdict_says_how_many_cases_reach_it() -> None:
    fast, slow = ({"cora": 1.0, "OpenVINO int8": t} for t in (2.0, 0.5))
    found = verdicts.verdicts([record("network", fast), record("network", slow)], {})
    seen = verdict(found, "OpenVINO int8")
    assert (seen.reached, seen.worst, seen.best, seen.mean) == (1, 0.5, 2.0, 1.0)
    assert "1 of 2" in verdicts._target_table(found)


def test_a_disturbed_case_has_no_verdict() -> None:
    seconds = {"cora": 1.0, "OpenVINO int8": 2.0}
    calm, busy = record("network", seconds, others=0.1), record("network", seconds, others=0.5)
    assert len(verdict(verdicts.verdicts([calm, busy], {}), "OpenVINO int8").values) == 1


def test_an_adapter_may_cost_eight_percent() -> None:
    seconds = {"cora W4A8 rank 3": 1.08, "cora no adapter": 1.0}
    found = verdicts.verdicts([record("conv3x3-codes", seconds)], {})
    assert verdict(found, "no adapter").worst == pytest.approx(0.08)
    worse = {"cora W4A8 rank 3": 1.2, "cora no adapter": 1.0}
    found = verdicts.verdicts([record("conv3x3-codes", worse)], {})
    assert verdict(found, "no adapter").reached == 0


def test_a_merged_adapter_is_judged_beside_the_one_that_is_not() -> None:
    seconds = {"cora W4A8 rank 3": 1.2, "cora no adapter": 1.0, rows.MERGED: 0.9}
    found = verdicts.verdicts([record("conv3x3-codes", seconds | {"OpenVINO int8": 0.9})], {})
    adapter = [v.worst for v in found if v.target.against == "no adapter"]
    assert adapter == pytest.approx([0.2, -0.1])
    peers = [v.worst for v in found if v.target.against.startswith("best of")]
    assert peers == pytest.approx([0.75, 1.0])


def test_page_names_what_is_absent_and_every_time() -> None:
    seconds = {"cora W4A8 rank 32": 250e-6, "torch float32": 6e-3}
    case = record("linear", seconds, bytes=5e6, absent={"ggml q4_0": "no library"})
    results = {
        "machine": {**machine.machine(), "versions": {"torch": "9"}}, "date": "2030-01-02",
        "peaks": {"1": {"read": 25.0}}, "peak names": machine.PEAKS, "cases": {"x": case},
    }  # fmt: skip
    page = verdicts.page(
        json.loads(json.dumps(results)), "performance.json", "## Why\n\nBecause.\n"
    )
    for part in (
        "Because.",
        "ggml q4_0: no library",
        "250 us",
        "6 ms",
        "20.0 GB/s",
        "2030-01-02",
        "80 %",
    ):
        assert part in page, part


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_peaks_are_measured() -> None:
    found = machine.peaks([1, 2], mebibytes=16)
    assert set(found) == {"1", "2"}
    has = machine.machine().get("instructions", [])
    if "avx2" in has:
        assert found["1"]["f32"] > 1 and found["2"]["read"] > 1
    assert ("amx_int8" in found["1"]) == ("amx_int8" in has)
    assert ("avx2_int8" in found["1"]) == ("avx2" in has and "avx512f" not in has)
