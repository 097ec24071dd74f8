"""What one unit costs in one step: small Linears, time over plain PyTorch, per unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.contender import Contender, Entry, prepare
from benchmarks.estimate import Estimate, difference, median
from benchmarks.ranks import run_ranks
from benchmarks.result import Record, Result, Table
from benchmarks.rounds import Series, Timing, time_rounds
from benchmarks.settings import Settings
from benchmarks.workload import Tower
from lightning_gemini.core import Home

#: Forward and backward, and the whole step.
WORKS = {"forward+backward": Contender.differentiate, "whole step": Contender.train}

_UNITS_PER_CHUNK = (4, 1)


def entries(tower: Tower) -> list[Entry]:
    """Who takes part: chunks of all units, of a few, and of one; kept, and freed and gathered again."""
    small = [(count, tower.chunk_size(count)) for count in _UNITS_PER_CHUNK]
    return [
        Entry("plain", "plain"),
        Entry("plain A/A", "plain"),
        Entry("DDP", "ddp"),
        Entry("FSDP2", "fsdp2"),
        Entry("gemini kept", "gemini"),
        *(Entry(f"gemini kept, {n} in a chunk", "gemini", chunk_size=size) for n, size in small),
        *(Entry(f"gemini moved, {n} in a chunk", "gemini", home=Home.DEVICE, chunk_size=size) for n, size in small),
    ]


def run(settings: Settings, ranks: int) -> Result:
    """Times forward and backward, then whole steps; one thread a rank."""
    tower = settings.tower
    repeats = 3 if ranks == 1 else 1
    timing = Timing(rounds=settings.pairs, repeats=repeats, warm=1)
    series = run_ranks(_measure, ranks, 1, entries(tower), tower, timing, settings.seed)[0]
    contenders = summarise(series, tower.units)
    record = {
        "benchmark": "hooks",
        "ranks": ranks,
        "threads": 1,
        "workload": asdict(tower),
        "timing": asdict(timing),
        "contenders": contenders,
    }
    return Result(_table(contenders, ranks, settings), record)


def summarise(series: dict[str, Sequence[Series]], units: int) -> list[Record]:
    """Per contender and work: microseconds per unit, and over plain."""
    per_unit = 1e6 / units
    contenders: dict[str, Record] = {}
    for work, all_of_it in series.items():
        plain = next(one for one in all_of_it if one.name == "plain")
        for one in all_of_it:
            over = difference(one.seconds, plain.seconds, per_unit)
            contenders.setdefault(one.name, {"name": one.name, "works": {}})["works"][work] = {
                "seconds": list(one.seconds),
                "median_us_per_unit": median(one.seconds) * per_unit,
                "us_per_unit_over_plain": asdict(over),
                "loss": one.loss,
            }
    return list(contenders.values())


def _measure(entries: Sequence[Entry], tower: Tower, timing: Timing, seed: int) -> dict[str, list[Series]]:
    contenders = [prepare(entry, tower) for entry in entries]
    for contender in contenders:
        contender.train()  # optimizer states are made here, whatever is timed first
    return {work: time_rounds(contenders, call, timing, seed) for work, call in WORKS.items()}


def _table(contenders: Sequence[Record], ranks: int, settings: Settings) -> Table:
    rows = []
    for c in contenders:
        cells = [c["name"]]
        for work in WORKS:
            numbers = c["works"][work]
            cells += [
                f"{numbers['median_us_per_unit']:.1f}",
                Estimate(**numbers["us_per_unit_over_plain"]).format("{:.1f}"),
            ]
        rows.append(tuple(cells))
    columns = ("contender", *(head for work in WORKS for head in (f"{work}, us", "over plain, us")))
    return Table(
        f"Hooks, {settings.tower.units} Linears {settings.tower.width} wide, {ranks} rank(s), one thread each",
        "Microseconds per unit and step: the median, and the median of pairwise differences to `plain` with its 95% "
        "bootstrap interval. Communication, copies and gradients' way into the chunks are all in it.",
        columns,
        tuple(rows),
    )
