"""Step time of an OPT-like model, as a ratio to plain PyTorch, DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch.distributed as dist

from benchmarks.contender import Contender, Entry, prepare
from benchmarks.estimate import Estimate, median, ratio
from benchmarks.ranks import run_ranks
from benchmarks.result import Record, Result, Table
from benchmarks.rounds import Series, Timing, time_rounds
from benchmarks.settings import Settings
from benchmarks.workload import Workload
from lightning_gemini.core import Home

REFERENCES = ("plain", "DDP", "FSDP2")


def entries(ranks: int) -> list[Entry]:
    """Who takes part; one rank alone moves its chunks between host and device, several gather them."""
    away = Home.HOST if ranks == 1 else Home.DEVICE
    return [
        Entry("plain", "plain"),
        Entry("plain A/A", "plain"),
        Entry("DDP", "ddp"),
        Entry("FSDP2", "fsdp2"),
        Entry("gemini kept", "gemini"),
        Entry("gemini moved", "gemini", home=away),
        Entry("plain bf16 autocast", "plain", bf16=True),
        Entry("FSDP2 bf16", "fsdp2", bf16=True),
        Entry("gemini kept bf16", "gemini", bf16=True),
        Entry("gemini moved bf16", "gemini", bf16=True, home=away),
    ]


def run(settings: Settings, ranks: int) -> Result:
    """Times whole steps, optimizer included."""
    threads = settings.threads(ranks)
    timing = Timing(rounds=settings.pairs)
    series = run_ranks(_measure, ranks, threads, entries(ranks), settings.opt, timing, settings.seed)[0]
    contenders = summarise(series)
    record = {
        "benchmark": "step",
        "ranks": ranks,
        "threads": threads,
        "workload": asdict(settings.opt),
        "timing": asdict(timing),
        "contenders": contenders,
    }
    return Result(_table(contenders, ranks, threads), record)


def summarise(series: Sequence[Series]) -> list[Record]:
    """Medians, and ratios to the references that took part."""
    seconds = {one.name: one.seconds for one in series}
    return [
        {
            "name": one.name,
            "seconds": list(one.seconds),
            "median_seconds": median(one.seconds),
            "loss": one.loss,
            "ratios": {
                name: asdict(ratio(one.seconds, seconds[name]))
                for name in REFERENCES
                if name in seconds and name != one.name
            },
        }
        for one in series
    ]


def _measure(entries: Sequence[Entry], workload: Workload, timing: Timing, seed: int) -> list[Series]:
    contenders = [prepare(entry, workload) for entry in entries]
    dist.barrier()
    return time_rounds(contenders, Contender.train, timing, seed)


def _table(contenders: Sequence[Record], ranks: int, threads: int) -> Table:
    rows = [
        (
            c["name"],
            f"{c['median_seconds'] * 1000:.0f}",
            *(Estimate(**c["ratios"][name]).format() if name in c["ratios"] else "1" for name in REFERENCES),
            f"{c['loss']:.3f}",
        )
        for c in contenders
    ]
    pairs = len(contenders[0]["seconds"])
    return Table(
        f"Step time, {ranks} rank(s) with {threads} thread(s) each",
        f"Median of {pairs} interleaved rounds; ratios are medians of pairs with 95% bootstrap intervals. `plain A/A` "
        "is `plain` again: what it differs from 1 by is noise. At several ranks `plain` is each rank training on its "
        "own, all at once. The loss is the last step's.",
        ("contender", "ms", *(f"/ {name}" for name in REFERENCES), "loss"),
        tuple(rows),
    )
