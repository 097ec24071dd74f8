"""The benchmark of a GPU: its floor by hand, its search, its contenders that fail, and the whole of it small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import sanitizer
from benchmarks.child import Outcome, run_child
from benchmarks.floor import Floor, Rates, Work, floor_of
from benchmarks.goals import GOALS, judge, measured
from benchmarks.gpu import Clock, in_round
from benchmarks.gpu_report import DRY, Findings
from benchmarks.job import Job, Machine, does_not_fit, jobs
from benchmarks.largest import MODES, depths, largest_depth
from benchmarks.machine import describe_machine
from benchmarks.rates import Extent, measure_rates
from benchmarks.row import Row, figures
from benchmarks.shapes import SHAPES, TINY, Shape, deep
from benchmarks.trainee import make, train

ROOT = Path(__file__).parents[1]
RATES = Rates(
    h2d=50e9, d2h=40e9, duplex=80e9, device_copy=2e12, matmul=500e12, host_copy=100e9, host_update=5e9, threads=16
)
PRELOAD = "tests.preload"  # one server for all tests of a process


@pytest.mark.parametrize(
    ("work", "floor", "seconds", "bound"),
    [
        (Work(1e15, 0, 0, 0), Floor(2.0, 0.0, 0.0), 2.0, "compute"),
        (Work(1e12, 100 * 10**9, 0, 0), Floor(0.002, 2.0, 0.0), 2.0, "PCIe"),
        (Work(1e12, 0, 100 * 10**9, 0), Floor(0.002, 2.5, 0.0), 2.5, "PCIe"),
        # both ways share what there is: 120 GB at 80 GB/s are longer than 60 at 50 or 60 at 40
        (Work(1e12, 60 * 10**9, 60 * 10**9, 10**9), Floor(0.002, 1.5, 0.2), 1.5, "PCIe"),
        (Work(1e12, 10**9, 10**9, 10**10), Floor(0.002, 0.025, 2.0), 2.0, "host update"),
    ],
)
def test_the_floor_is_the_longest_part(work: Work, floor: Floor, seconds: float, bound: str) -> None:
    found = floor_of(work, RATES)
    assert (found.compute, found.pcie, found.update) == pytest.approx((floor.compute, floor.pcie, floor.update))
    assert (found.seconds, found.bound) == (pytest.approx(seconds), bound)


def test_shapes_have_the_parameters_of_the_models() -> None:
    for shape in (*SHAPES.values(), *TINY.values()):
        assert sum(p.numel() for p in shape.build().parameters()) == shape.parameters
    assert [round(shape.parameters / 1e9, 1) for shape in SHAPES.values()] == [1.3, 6.7, 12.9]
    assert deep(SHAPES["opt-13b"], 44).parameters == pytest.approx(14.1e9, rel=0.01)


def test_flops_by_hand() -> None:
    shape = Shape("two", layers=2, width=8, heads=1, vocabulary=10, length=4, checkpointing=False)
    layers, others = 2 * (12 * 64 + 13 * 8), (10 + 4 + 2) * 8 + 16
    assert shape.parameters == layers + others
    assert shape.model_flops(4) == 4 * (6 * shape.parameters + 12 * 2 * 8 * 4)
    assert shape.least_flops(4) == 4 * (6 * shape.parameters + 6 * 2 * 8 * 4)
    again = Shape("two", 2, 8, 1, 10, 4, checkpointing=True)
    assert again.model_flops(4) == shape.model_flops(4)
    assert again.least_flops(4) == shape.least_flops(4) + 4 * (2 * layers + 2 * 2 * 8 * 4)


def test_rates_are_positive() -> None:
    found = measure_rates(torch.device("cpu"), Extent(copy=2**16, matmul=32, update=2**10, repeats=2))
    assert all(value > 0 for value in vars(found).values())


# The search


@pytest.mark.parametrize("most", [1, 7, 64])
@pytest.mark.parametrize("first", [1, 5, 40, 100])
def test_the_search_finds_the_greatest_depth(first: int, most: int) -> None:
    for limit in range(most + 2):
        seen: list[int] = []

        def trains(depth: int, limit: int = limit, seen: list[int] = seen) -> bool:
            seen.append(depth)
            return depth <= limit

        found = largest_depth(trains, first, most, lambda: True)
        assert (found.best, found.finished) == (min(limit, most), True)
        assert len(seen) == len(set(seen)), "no depth is tried twice"
        assert all(1 <= depth <= most for depth in seen)
        assert len(seen) <= 14


def test_a_search_that_is_cut_says_so() -> None:
    left = iter([True, True, False])
    found = largest_depth(lambda depth: depth < 30, 20, 100, lambda: next(left))
    assert (found.best, found.finished, len(found.tried)) == (21, False, 2)
    unknown = largest_depth(lambda depth: None, 20, 100, lambda: True)
    assert (unknown.best, unknown.finished, unknown.tried) == (0, False, ((20, None),))


def test_the_search_begins_with_the_goal_where_it_could_be_met() -> None:
    shape, gib = SHAPES["opt-13b"], 2**30
    first, most = depths(MODES[0], shape, Machine("cuda", None, None, 80 * gib, 128 * gib, 16))
    assert deep(shape, first).parameters >= 14e9 > deep(shape, first - 1).parameters
    assert 14 * deep(shape, most).parameters <= 208 * gib < 14 * deep(shape, most + 1).parameters
    first, most = depths(MODES[0], shape, Machine("cuda", None, None, 24 * gib, 64 * gib, 16))
    assert first < most
    assert 14 * deep(shape, first).parameters <= 0.92 * 88 * gib


# Contenders


def _succeed(say: Callable[[dict], None], value: int) -> int:
    say({"device_peak": 5})
    return value + torch.get_num_threads()


def _fail(say: Callable[[dict], None]) -> None:
    say({"device_peak": 7})
    raise MemoryError("no room:\n  none at all")


def _die(say: Callable[[dict], None]) -> None:
    say({"device_peak": 9})
    os._exit(3)


def _sleep(say: Callable[[dict], None]) -> None:
    time.sleep(60)


def test_a_process_of_its_own_ends_as_a_value() -> None:
    done = run_child(_succeed, 40, timeout=60, threads=2, preload=PRELOAD)
    assert (done.value, done.error, done.said) == (42, None, {"device_peak": 5})
    assert sys.platform != "linux" or done.host_peak > 2**20
    failed = run_child(_fail, timeout=60, threads=1, preload=PRELOAD)
    assert (failed.value, failed.error) == (None, "MemoryError: no room: none at all")
    assert "_fail" in failed.details
    died = run_child(_die, timeout=60, threads=1, preload=PRELOAD)
    assert (died.error, died.said) == ("the process died (exit code 3)", {"device_peak": 9})
    late = run_child(_sleep, timeout=0.5, threads=1, preload=PRELOAD)
    assert late.error == "not done within 0 s"
    assert late.seconds < 30


def _job(name: str, way: str = "gemini", shape: str = "opt-6.7b") -> Job:
    return Job(name, SHAPES[shape], 8, way=way)  # type: ignore[arg-type]


def _good(seconds: list[float], **values: object) -> Outcome:
    plan = {"fetched": 10**10, "offloaded": 10**10, "hosted": 10**9}
    result = {"seconds": seconds, "clip_pairs": [(1.01, 1.0)], "plan": plan, "fragments": 1, "chunks": 100}
    return Outcome({**result, "device_peak": 8, "pinned": 4, "timeline": "", **values}, host_peak=6)


def test_a_contender_that_fails_is_a_row_with_its_peak() -> None:
    row = Row(_job("auto"))
    row.add(0, Outcome(None, {"device_peak": 5, "device_peak_at_failure": 11}, "OutOfMemoryError: no room", "", 6))
    found = figures(row, RATES, [row])
    assert (found["problem"], found["device_peak"], found["host_peak"]) == ("OutOfMemoryError: no room", 11, 6)
    assert found["tokens_per_second"] is found["floor"] is found["speed_to_fsdp2"] is None
    row.add(1, _good([1.0, 3.0]))
    assert figures(row, RATES, [row])["tokens_per_second"] == 8 * 2048 / 2.0
    row.add(2, Outcome(None, {}, "the process died"))
    assert figures(row, RATES, [row])["problem"] == "the process died"
    assert row.rounds == {1: [1.0, 3.0]}, "what was measured before stays"
    text = _findings([row]).tables()[2].markdown()
    assert "the process died" in text


def test_figures_by_hand() -> None:
    auto, peer = Row(_job("auto")), Row(_job("FSDP2 offload", "fsdp2"))
    for number, (mine, theirs) in enumerate([(1.0, 2.0), (2.0, 8.0)]):
        auto.add(number, _good([mine]))
        peer.add(number, _good([theirs], plan=None, clip_pairs=[], chunks=None))
    found = figures(auto, RATES, [auto, peer])
    shape = auto.job.shape
    assert found["seconds"] == 1.5
    assert found["flops"] == pytest.approx(shape.model_flops(8 * 2048) / 1.5)
    assert found["floor"]["seconds"] == pytest.approx(shape.least_flops(8 * 2048) / 500e12)
    assert found["of_the_floor"] == pytest.approx(found["floor"]["seconds"] / 1.5)
    assert found["speed_to_fsdp2"] == 3.0  # the median of 2 and 4
    assert (found["clip_cost"], found["fragments"]) == (pytest.approx(0.01), 0.01)
    assert figures(peer, RATES, [auto, peer])["floor"] is None
    assert figures(auto, None, [auto])["floor"] is None


def test_contenders_of_a_workload_change_their_order() -> None:
    rows = [Row(job) for job in jobs(SHAPES, list(SHAPES), tiny=False)]
    assert {row.job.shape.name for row in rows} == {"OPT-1.3B", "OPT-6.7B", "OPT-13B"}
    assert list(in_round(rows, 0)) == rows
    again = list(in_round(rows, 1))
    assert sorted(map(id, again)) == sorted(map(id, rows))
    assert [row.job.name for row in again[:2]] == ["FSDP2 offload", "auto"]
    for row in rows:
        if row.job.way == "fsdp2":
            assert any(other.job.group == row.job.group and other.job.name == "auto" for other in rows)


def test_what_cannot_fit_is_not_tried() -> None:
    machine = Machine("cuda", None, None, 80 * 2**30, 120 * 2**30, 16)
    assert does_not_fit(_job("plain", "plain", "opt-1.3b"), machine) is None
    assert "the device has 80 GiB" in (does_not_fit(_job("plain", "plain"), machine) or "")
    assert does_not_fit(_job("FSDP2 offload", "fsdp2"), machine) is None
    assert "192 GiB, the host has 120 GiB" in (does_not_fit(_job("f", "fsdp2", "opt-13b"), machine) or "")
    assert does_not_fit(_job("auto", shape="opt-13b"), machine) is None


def test_goals_are_judged_by_what_was_measured() -> None:
    auto = {"name": "x auto", "of_the_floor": 0.9, "speed_to_fsdp2": 2.5, "clip_cost": 0.03, "fragments": 0.01}
    slow = {**auto, "speed_to_fsdp2": 1.5, "clip_cost": None, "fragments": None}
    host = {**auto, "name": "x host", "of_the_floor": 0.1, "fragments": 0.02}
    values = measured([auto, slow, host], {"with clipping": 14.1e9, "in backward": 0.0})
    assert values == {
        "floor": 0.9, "fsdp2": 1.5, "with clipping": 14.1, "in backward": 0.0, "bf16 states, with clipping": None,
        "clipping": 0.03, "fragments": 0.02,
    }  # fmt: skip
    verdicts = [judge(name, value, real=True) for name, value in values.items()]
    assert verdicts == ["met", "not met", "met", "not met", "not measured", "not met", "met"]
    assert {judge(name, value, real=False) for name, value in values.items()} == {"not measured"}
    assert {mode.name for mode in MODES} < GOALS.keys()


def test_contenders_train_the_same_model() -> None:
    machine = Machine("cpu", 2**20, 2**23, None, None, 1)
    shape = TINY["opt-6.7b"]
    plain = make(Job("plain", shape, 1, way="plain"), machine)
    assert sum(p.numel() for p in plain.model.parameters()) == shape.parameters, "the head is the embedding"
    assert plain.model.lm_head.weight is plain.model.model.decoder.embed_tokens.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_what_is_planned_is_what_is_moved(accumulation: int) -> None:
    machine = Machine("cpu", 2**20, 2**23, None, None, 1, warmup=3, steps=2)
    job = Job("auto", TINY["opt-6.7b"], 1, accumulation, clip_pairs=1, draw=True)
    result = train(lambda record: None, job, machine)
    assert result["losses"][-1] < result["losses"][0]
    assert len(result["seconds"]) == 2
    assert len(result["clip_pairs"]) == 1
    moved, plan = result["moved"], result["plan"]
    assert moved["offloaded"] == plan["offloaded"] > 0
    assert moved["fetched"] == pytest.approx(plan["fetched"], rel=0.01)
    assert 0 < plan["hosted"] <= job.shape.parameters
    assert result["device_peak"] <= 2**20
    assert json.loads(result["timeline"])["moments"]


# Sanitizers


def test_sanitizers_that_are_not_there_are_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    outcomes = [one["outcome"] for one in sanitizer.check(lambda: 60.0, has_gpu=False)]
    assert outcomes == ["not present", "not present", "not run: no GPU"]


@pytest.mark.parametrize(("status", "outcome"), [(0, "clean"), (9, "errors"), (4, "failed (exit 4)")])
def test_what_a_sanitizer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, outcome: str) -> None:
    binary = tmp_path / "compute-sanitizer"
    binary.write_text(f'#!/bin/sh\necho "$@"\nexit {status}\n')
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert sanitizer.find() == str(binary)
    monkeypatch.setattr(sanitizer, "_CHECKS", sanitizer._CHECKS[:2])
    found = sanitizer.check(lambda: 60.0, has_gpu=True)
    assert [one["outcome"] for one in found] == [outcome] * 2
    assert [tool in one["output"] for tool, one in zip(("memcheck", "racecheck"), found, strict=True)] == [True, True]


def test_what_sanitizers_watch_trains() -> None:
    losses = sanitizer.train(torch.device("cpu"))
    assert losses[-1] < losses[0]


# The whole


def _findings(rows: list[Row]) -> Findings:
    head = {"date": "2026-01-01", "machine": describe_machine(), "load": {"before": 0, "after": 0}}
    return Findings(head, "a device", True, SHAPES["opt-13b"], RATES, rows=rows)


def test_a_run_without_time_has_a_row_for_everything() -> None:
    assert Clock(time.monotonic() - 1).left() == 0
    assert Clock(time.monotonic() + 4).over()
    assert not Clock(time.monotonic() + 100).over()
    findings = _findings([Row(_job("auto"), problem="not run: no time was left")])
    assert findings.tables()[0].title == "Goals"
    assert "not measured" in findings.tables()[0].markdown()
    assert findings.record()["goals"]["floor"]["verdict"] == "not measured"
    assert findings.picture() is None


def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-cpu", "--minutes", "0.65", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(DRY) >= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md", "gpu.png"]
    report = json.loads((tmp_path / "gpu.json").read_text())
    (result,) = report["results"]
    assert (result["benchmark"], result["real"]) == ("gpu", False)
    assert {goal["verdict"] for goal in result["goals"].values()} == {"not measured"}
    assert result["rates"]["h2d"] > 0
    rows = {one["name"]: one for one in result["contenders"]}
    auto, peer = rows["tiny-6.7B 2x1 auto"], rows["tiny-6.7B 2x1 FSDP2 offload"]
    for one in (auto, peer):
        assert one["problem"] is None, one["details"]
        assert one["tokens_per_second"] > 0
        assert one["host_peak"] > 2**20
        assert one["result"]["losses"][0] == pytest.approx(6.24, abs=0.2)  # ln 512
    assert 0 < auto["of_the_floor"] < 1
    assert auto["speed_to_fsdp2"] > 0
    assert auto["device_peak"] <= 2**20
    assert {"plain", "device", "host"} <= {name.split(" ", 2)[2] for name in rows}
    text = (tmp_path / "gpu.md").read_text()
    assert "Dry run on the CPU" in text
    assert "(gpu.png)" in text
