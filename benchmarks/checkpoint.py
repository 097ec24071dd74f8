"""What it costs to save and to load a training state, beside torch.save, DCP and safetensors on the same bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeVar

from benchmarks import checkpoint_tables as tables
from benchmarks.estimate import Estimate, estimate, median, ratio
from benchmarks.ranks import run_ranks
from benchmarks.result import Record, Result
from benchmarks.rounds import Series, Timing
from benchmarks.save_goals import GOALS, PREDICTED, judge
from benchmarks.save_memory import AsyncExtra, Extra, measure_async, measure_extra
from benchmarks.save_times import IN_MEMORY, LOAD, ON_DISK, Times, measure_times
from benchmarks.savers import AGAIN, BARE, DCP, FILES, GEMINI, MIXED, NAMES, SPLIT, TORCH
from benchmarks.settings import Settings
from benchmarks.standstill import LATER, REFERENCES, SPLIT_LATER, measure_standstill
from benchmarks.workload import Tower
from lightning_gemini.core import DtypePolicy

T = TypeVar("T", Extra, AsyncExtra)

#: Many small parameters, so that what a tensor costs shows beside what a byte costs.
MANY = Tower(units=750, width=128)
_FEW = Tower(units=6, width=8)

_SHM = Path("/dev/shm")  # where files are in memory, on Linux
_MANY_NAMES = tuple(name for name in NAMES if name not in (SPLIT, TORCH))
_POLICIES = {GEMINI: DtypePolicy(), SPLIT: MIXED}
_BRIEF_NAMES = (GEMINI, BARE, TORCH, DCP)


def run(settings: Settings, ranks: int) -> list[Result]:
    """Measures everything at one number of ranks; the last table says which goals are met."""
    threads, pairs, seed, opt = settings.threads(ranks), settings.pairs, settings.seed, settings.opt
    many = _FEW if settings.brief else MANY
    names = {name for name in NAMES if not settings.brief or name in _BRIEF_NAMES}
    everybody = [name for name in NAMES if name in names]
    with _folders() as (disk, memory):
        files = memory or disk
        of_opt = run_ranks(measure_times, ranks, threads, everybody, opt, disk, memory, pairs, seed)[0]
        of_many = run_ranks(
            measure_times, ranks, threads, [n for n in _MANY_NAMES if n in names], many,
            None if memory else disk, memory, pairs, seed,
        )[0]  # fmt: skip
        extras = {
            name: _most(run_ranks(measure_extra, ranks, threads, name, opt, files))
            for name in everybody
            if name not in (AGAIN, BARE, FILES, TORCH)
        }
        background = {
            name: _most(run_ranks(measure_async, ranks, threads, opt, policy, files))
            for name, policy in _POLICIES.items()
        }
        stops, copied = run_ranks(measure_standstill, ranks, threads, opt, files, Timing(rounds=pairs), seed)[0]
        record = {
            "benchmark": "checkpoint",
            "ranks": ranks,
            "threads": threads,
            "workload": {"opt": asdict(opt), "many": asdict(many)},
            "folders": {"disk": _file_system(disk), "memory": _file_system(memory)},
        }
    record["times"] = {"opt": summarise_times(of_opt), "many": summarise_times(of_many)}
    record["checksums"] = summarise_checksums(of_opt, ranks)
    record["memory"] = summarise_memory(extras, background, of_opt.chunk_bytes)
    record["standstill"] = {"bytes": copied, "contenders": summarise_stops(stops)}
    record["goals"] = summarise_goals(record, ranks, real=not settings.brief)
    return [Result(table, record if not number else {}) for number, table in enumerate(tables.all_of(record))]


def summarise_times(times: Times) -> Record:
    """By what was done, each contender's seconds and their ratio to DCP's; and the bytes of its files."""
    return {
        "file_bytes": times.nbytes,
        **{what: _ratios(series, dict.fromkeys(NAMES, DCP)) for what, series in times.series.items()},
    }


def summarise_checksums(times: Times, ranks: int) -> Record:
    """Their bytes per second, and the share of the time that they take: measured, and computed from that rate."""
    shares = {}
    for what, series in times.series.items():
        seconds = {one.name: one.seconds for one in series}
        own, bare = seconds[GEMINI], seconds[BARE]
        shares[what] = {
            "measured": asdict(estimate([1 - b / a for a, b in zip(own, bare, strict=True)])),
            "computed": times.nbytes[GEMINI] / ranks / times.hash_rate / median(own),
        }
    return {"bytes_per_second": times.hash_rate, "shares": shares}


def summarise_memory(extras: dict[str, Extra], background: dict[str, AsyncExtra], chunk: int) -> Record:
    """Bytes by contender, of the rank that has the most; ``chunk_bytes`` is what they are compared with."""
    return {
        "chunk_bytes": chunk,
        "contenders": [{"name": name, **asdict(one)} for name, one in extras.items()],
        "background": [{"name": name, **asdict(one)} for name, one in background.items()],
    }


def summarise_stops(series: Sequence[Series]) -> list[Record]:
    """Each contender's seconds, and their ratio to one copy of the same tensors."""
    return _ratios(series, REFERENCES)


def summarise_goals(record: Record, ranks: int, real: bool) -> list[Record]:
    """Each goal with what was predicted, what came, and the verdict."""
    opt, many, memory = record["times"]["opt"], record["times"]["many"], record["memory"]
    extra = [one for one in memory["contenders"] if one["name"] in _POLICIES]
    background = [one["resident"] for one in memory["background"]]
    found = {
        "save on disk": _ratio_of(opt, ON_DISK, BARE),
        "save in memory": _ratio_of(opt, IN_MEMORY, BARE),
        "load": _ratio_of(opt, LOAD, BARE),
        "save, many": _ratio_of(many, IN_MEMORY, BARE),
        "load, many": _ratio_of(many, LOAD, BARE),
        "save memory": _in_chunks([one[key] for one in extra for key in ("save", "save_resident")], memory),
        "load memory": _in_chunks([one[key] for one in extra for key in ("load", "load_resident")], memory),
        "async memory": _in_chunks(background, memory),
        "standstill": _ratio_of(record["standstill"], "contenders", LATER),
        "standstill, split": _ratio_of(record["standstill"], "contenders", SPLIT_LATER),
    }
    return [
        {
            "name": name,
            "goal": goal.text,
            "predicted": PREDICTED.get(ranks, {}).get(name, "-"),
            "came": found[name],
            "verdict": judge(goal, found[name], real),
        }
        for name, goal in GOALS.items()
    ]


def _ratios(series: Sequence[Series], references: dict[str, str]) -> list[Record]:
    seconds = {one.name: one.seconds for one in series}
    found = []
    for one in series:
        reference = references.get(one.name)
        of = None if reference in (None, one.name) else asdict(ratio(one.seconds, seconds[reference]))
        record = {"name": one.name, "seconds": list(one.seconds), "median_seconds": median(one.seconds), "ratio": of}
        found.append(record)
    return found


def _ratio_of(record: Record, what: str, name: str) -> Record | None:
    return next((one["ratio"] for one in record.get(what, ()) if one["name"] == name), None)


def _in_chunks(nbytes: Sequence[int | None], memory: Record) -> Record | None:
    known = [one for one in nbytes if one is not None]
    if not known:
        return None
    value = max(known) / memory["chunk_bytes"]
    return asdict(Estimate(value, value, value))


def _most(every: Sequence[T]) -> T:
    """Of each figure the largest on any rank."""
    values = {field.name: [getattr(one, field.name) for one in every] for field in fields(every[0])}
    return type(every[0])(**{key: None if None in found else max(found) for key, found in values.items()})


@contextmanager
def _folders() -> Iterator[tuple[Path, Path | None]]:
    """A folder on disk, and one in memory, where there is such a thing."""
    with tempfile.TemporaryDirectory(prefix="gemini-benchmark-") as disk:
        if not os.access(_SHM, os.W_OK):
            yield Path(disk), None
            return
        with tempfile.TemporaryDirectory(prefix="gemini-benchmark-", dir=_SHM) as memory:
            yield Path(disk), Path(memory)


def _file_system(folder: Path | None) -> str | None:
    """The kind of file system that a folder is on, as far as Linux tells."""
    mounts = Path("/proc/mounts")
    if folder is None or not mounts.exists():
        return None
    kinds = {Path(line.split()[1]): line.split()[2] for line in mounts.read_text().splitlines()}
    return next(kinds[parent] for parent in (folder, *folder.parents) if parent in kinds)
