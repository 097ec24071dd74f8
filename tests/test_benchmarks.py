"""The benchmarks run, write what their README says, and estimate and count rightly. Nothing here is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from benchmarks.estimate import difference, estimate, median, ratio
from benchmarks.hooks import summarise as summarise_hooks
from benchmarks.machine import describe_machine
from benchmarks.optimizer import COPY, REFERENCE
from benchmarks.optimizer import summarise as summarise_optimizer
from benchmarks.placement import Shape, best_split, bytes_of, draw, layout_of, measure, ratio_to_static
from benchmarks.placement import trace_of as trace_of_opt
from benchmarks.ranks import ENVIRONMENT
from benchmarks.report import write
from benchmarks.result import Result, Table
from benchmarks.rounds import Series
from benchmarks.settings import Settings, quick
from benchmarks.step import summarise as summarise_steps
from benchmarks.traffic import fewest_loads
from benchmarks.workload import Tower
from lightning_gemini.core import ParamSpec, plan_layout

ROOT = Path(__file__).parents[1]


def test_median() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_estimate_of_equal_samples_has_no_width() -> None:
    found = estimate([2.0] * 30)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    assert found.format() == "2.00 [2.00, 2.00]"


def test_estimate_holds_the_median_and_repeats() -> None:
    samples = [float(number % 17) for number in range(100)]
    found = estimate(samples)
    assert min(samples) <= found.low <= found.median == median(samples) <= found.high <= max(samples)
    assert found.low < found.high
    assert estimate(samples) == found


def test_estimate_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        estimate([])


def test_ratio_and_difference_pair_the_rounds() -> None:
    assert ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]).format("{:g}") == "2 [2, 2]"
    assert difference([3.0, 12.0, 101.0], [1.0, 10.0, 99.0], 1000).format("{:g}") == "2000 [2000, 2000]"
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_summaries() -> None:
    series = [Series("plain", (1.0, 2.0, 4.0), 0.5), Series("DDP", (2.0, 4.0, 8.0), 0.5)]
    plain, ddp = summarise_steps(series)
    assert plain["median_seconds"] == 2.0
    assert ddp["ratios"]["plain"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert "plain" not in plain["ratios"]
    plain, ddp = summarise_hooks({"forward+backward": series}, units=100)
    numbers = ddp["works"]["forward+backward"]
    assert numbers["median_us_per_unit"] == pytest.approx(4e4)
    assert numbers["us_per_unit_over_plain"]["median"] == pytest.approx(2e4)


def test_summary_of_the_optimizer() -> None:
    series = [Series(name, seconds, 0.0) for name, seconds in ((REFERENCE, (4.0, 8.0)), (COPY, (1.0, 2.0)))]
    reference, copy = summarise_optimizer(series, {REFERENCE: 40, COPY: 28}, n=12)
    assert (copy["ratio"]["median"], copy["bandwidth_to_copy"]["median"]) == (0.25, 1.0)
    assert reference["bandwidth_to_copy"]["median"] == pytest.approx(40 / 28 / 4)
    assert reference["parameters_per_second"] == 2.0


def test_markdown() -> None:
    table = Table("Title", "Note.", ("name", "number"), (("a", "1"), ("b", "2")))
    assert table.markdown() == ("## Title\n\nNote.\n\n| name | number |\n| --- | ---: |\n| a | 1 |\n| b | 2 |")
    assert Result(table, {}).table is table


def test_placement_of_a_small_model() -> None:
    shape = Shape(layers=2, width=128, vocabulary=1000, length=64)
    layout, units = layout_of(shape)
    assert {unit for unit, _ in shape.units()} == set(shape.forward()) == set(units)
    chunks = bytes_of(layout)
    trace = trace_of_opt(shape, units, [chunk.full for chunk in chunks])
    assert set(trace.order) == set(range(len(chunks)))
    assert trace.moments[-1].other >= chunks[trace.order[0]].full, "the last gradient waits in its buffer"
    total = sum(chunk.kept for chunk in chunks)
    other = max(moment.other for moment in trace.moments)
    assert best_split(trace, chunks, total + other) == 0
    assert best_split(trace, chunks, 0) is None
    full = sum(chunk.full for chunk in chunks)
    streamed = best_split(trace, chunks, max(2 * full, total // 4))
    assert streamed is not None
    assert 0 < streamed <= 3 * full
    point = measure(trace, chunks, 100, total + other, repeats=1)
    assert point is not None
    assert (point.auto, point.static, point.homes, ratio_to_static(point)) == (0, 0, len(chunks), 1.0)
    for percent in (80, 60, 40):
        point = measure(trace, chunks, percent, total + other, repeats=1)
        assert point is not None
        assert point.least <= point.auto <= point.host
        assert (ratio_to_static(point) or 0) <= 1.05
    assert measure(trace, chunks, 1, total + other, repeats=1) is None
    assert draw([point], "OPT").startswith(b"\x89PNG")


def test_a_picture_has_its_benchmarks_name(tmp_path: Path) -> None:
    head = {"date": "", "machine": describe_machine(), "load": {"before": 0, "after": 0}}
    table = Table("Title", "Note.", ("name",), (("a",),))
    paths = write(tmp_path, "all", head, [Result(table, {"benchmark": "one"}, b"png"), Result(table, {})])
    assert [path.name for path in paths] == ["all.md", "all.json", "one.png"]
    assert (tmp_path / "one.png").read_bytes() == b"png"
    assert (tmp_path / "all.md").read_text().count("![Title](one.png)") == 1


def _try_all(needs: list[frozenset[int]], capacity: int) -> int:
    """The fewest loads, by trying every choice of what stays."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for need in needs:
        following: dict[frozenset[int], int] = {}
        for present, loads in states.items():
            others = sorted(present - need)
            for keep in product((False, True), repeat=len(others)):
                stay = need | {piece for piece, kept in zip(others, keep, strict=True) if kept}
                if len(stay) <= max(capacity, len(need)):
                    cost = loads + len(need - present)
                    following[stay] = min(cost, following.get(stay, cost))
        states = following
    return min(states.values())


@pytest.mark.parametrize("capacity", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "order",
    ["0123443210", "01020304", "0123012301233210", "0011223300", "021302132031", ""],
)
def test_fewest_loads_is_the_minimum(order: str, capacity: int) -> None:
    needs = [frozenset({int(piece)}) for piece in order]
    assert len(fewest_loads(needs, capacity)) == _try_all(needs, capacity)


def test_fewest_loads_of_sets() -> None:
    needs = [frozenset(need) for need in ({0, 1}, {1, 2}, {0, 3}, {0, 1}, {2, 3})]
    for capacity in (2, 3, 4):
        assert len(fewest_loads(needs, capacity)) == _try_all(needs, capacity)
    assert fewest_loads([frozenset({2, 0})], 1) == [0, 2]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("count", [1, 4])
def test_tower_chunks_hold_as_many_units_as_asked(count: int, ranks: int) -> None:
    tower = Tower(units=8)
    params = [
        ParamSpec(name, tuple(p.shape), p.stride(), p.dtype, True, 0, 0) for name, p in tower.build().named_parameters()
    ]
    layout = plan_layout(params, ranks, tower.chunk_size(count))
    assert [len(chunk.slots) for chunk in layout.chunks] == [2 * count] * (8 // count)


def test_threads_are_shared() -> None:
    assert Settings().threads(10**6) == 1
    assert Settings().threads(1) >= Settings().threads(2)
    assert quick(2).pairs == 2


def test_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--pairs", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.json", "benchmarks.md", "placement.png"]
    assert "gemini moved" in done.stdout

    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert report.keys() == {"date", "machine", "settings", "load", "results"}
    assert report["settings"]["quick"] is True
    assert report["machine"]["environment"] == ENVIRONMENT
    kinds = [(result["benchmark"], result["ranks"]) for result in report["results"]]
    assert kinds == [*product(("step", "hooks", "memory"), (1, 2)), ("optimizer", 1), ("placement", 1), ("overlap", 1)]
    *others, overlap = report["results"]
    for row in overlap["rows"]:
        assert [one["name"] for one in row["contenders"]] == ["at once", "at once, A/A", "in the background"]
        assert len({one["loss"] for one in row["contenders"]}) == 1
        assert 0 <= row["hidden_share"] <= 1
    for result in others:
        names = [contender["name"] for contender in result["contenders"]]
        assert {"optimizer": "fused, casts", "placement": "auto"}.get(result["benchmark"], "plain") in names
        assert result["threads"] >= 1
        for contender in result["contenders"]:
            _check(result["benchmark"], contender)
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.count("\n## ") == 11
    assert "(placement.png)" in text


def test_quick_run_of_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "checkpoint", "--pairs", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "checkpoint.json").read_text())
    assert {result["ranks"] for result in report["results"]} == {1, 2}
    assert {result["benchmark"] for result in report["results"]} == {"checkpoint"}
    assert "DCP" in (tmp_path / "checkpoint.md").read_text()


def _check(benchmark: str, contender: dict) -> None:
    if benchmark == "step":
        assert contender.keys() == {"name", "seconds", "median_seconds", "loss", "ratios"}
        assert len(contender["seconds"]) == 2
        if "bf16" not in contender["name"]:  # everybody trains the same model on the same batch
            assert contender["loss"] == pytest.approx(5.4, abs=0.2)
    elif benchmark == "hooks":
        for numbers in contender["works"].values():
            assert numbers.keys() == {"seconds", "median_us_per_unit", "us_per_unit_over_plain", "loss"}
    elif benchmark == "placement":
        assert len(contender["percent"]) == len(contender["moved_bytes"]) == len(contender["device_bytes"])
        assert contender["percent"][-1] == 100
    elif benchmark == "optimizer":
        assert len(contender["seconds"]) == 2
        assert contender["parameters_per_second"] * contender["median_seconds"] == pytest.approx(2**16)
    else:
        nbytes, traffic = contender["bytes_per_parameter"], contender["traffic"]
        assert max(nbytes["rest"], nbytes["loaded"]) <= nbytes["peak"]
        if contender["name"].startswith("gemini"):
            assert nbytes["loaded"] == pytest.approx(nbytes["counted"], rel=0.05)
            assert all(traffic["moved"][key] >= least for key, least in traffic["least"].items())
        else:
            assert traffic is None
