"""Bytes per parameter, and exact counts of what one step moves, beside their minima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.contender import Entry
from benchmarks.footprint import Footprint, measure_footprint
from benchmarks.ranks import run_ranks
from benchmarks.result import Result, Table
from benchmarks.settings import Settings
from benchmarks.step import entries as step_entries
from benchmarks.traffic import Traffic, measure_traffic
from benchmarks.workload import Workload


def entries(ranks: int, brief: bool) -> list[Entry]:
    """Everybody of the step benchmark once, or four of them."""
    names = {"plain", "FSDP2", "gemini kept", "gemini moved bf16"} if brief else None
    return [e for e in step_entries(ranks) if e.name != "plain A/A" and (names is None or e.name in names)]


def run(settings: Settings, ranks: int) -> list[Result]:
    """Measures each contender in processes of its own."""
    threads = settings.threads(ranks)
    measured = []
    for entry in entries(ranks, settings.brief):
        footprint, traffic = run_ranks(_measure, ranks, threads, entry, settings.opt)[0]
        measured.append((entry.name, footprint, traffic))
    record = {
        "benchmark": "memory",
        "ranks": ranks,
        "threads": threads,
        "workload": asdict(settings.opt),
        "contenders": [
            {"name": name, "bytes_per_parameter": asdict(f), "traffic": asdict(t) if t else None}
            for name, f, t in measured
        ],
    }
    counted: list[tuple[str, Traffic]] = [(name, t) for name, _, t in measured if t is not None]
    return [Result(_footprints(measured, ranks), record), Result(_traffic(counted, ranks), {})]


def _measure(entry: Entry, workload: Workload) -> tuple[Footprint, Traffic | None]:
    footprint, contender = measure_footprint(entry, workload)
    return footprint, measure_traffic(contender) if contender.engine is not None else None


def _footprints(measured: Sequence[tuple[str, Footprint, Any]], ranks: int) -> Table:
    rows = []
    for name, f, _ in measured:
        own = ["", "", ""]
        if f.layout is not None and f.counted is not None:
            own = [f"{f.layout:.2f}", f"{f.counted:.2f}", f"{f.loaded / f.layout:.2f}"]
        rows.append((name, f"{f.rest:.2f}", f"{f.loaded:.2f}", f"{f.peak:.2f}", *own))
    return Table(
        f"Bytes per parameter on one rank, {ranks} rank(s)",
        "What is held: at rest (after a step), loaded (before one, with gradients), and at the peak, "
        "activations included. Beside it what the layout says `loaded` should be, and what the engine's tiers count.",
        ("contender", "at rest", "loaded", "peak", "layout", "counted", "loaded / layout"),
        tuple(rows),
    )


def _traffic(counted: Sequence[tuple[str, Traffic]], ranks: int) -> Table:
    rows = []
    for name, t in counted:
        rows.append((name, f"unit calls in {t.chunks} chunks", str(t.units), "", ""))
        rows.append((name, "most chunks unsharded at a time", str(t.resident), "", ""))
        for key, least in t.least.items():
            moved, scale, digits = t.moved[key], 1.0, 0
            if not moved and not least:
                continue
            if key.endswith("_bytes"):
                scale, digits = 2**20, 2
            ratio = f"{moved / least:.3f}" if least else "-"
            label = key.replace("_bytes", ", MiB")
            rows.append((name, label, f"{moved / scale:.{digits}f}", f"{least / scale:.{digits}f}", ratio))
    return Table(
        f"What one step moves on one rank, {ranks} rank(s)",
        "The engine's counters. The least number of unshards is Belady's for this order of units, a mirrored backward, "
        "and as many chunks unsharded at a time as there were at most; the least bytes are those of the parameters in "
        "these chunks, times (ranks - 1) / ranks where ranks exchange them.",
        ("contender", "count", "per step", "least", "ratio"),
        tuple(rows),
    )
