"""``python -m benchmarks.gpu``: the engine on one GPU, beside FSDP2, plain PyTorch and what the machine could do.

Runs for a limited time with the most valuable first, and writes what it has found after each contender.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import sanitizer
from benchmarks.child import run_child
from benchmarks.floor import Rates
from benchmarks.gpu_report import DRY, Findings
from benchmarks.job import Machine, does_not_fit, jobs
from benchmarks.largest import MODES, Mode, Search, depths, largest_depth
from benchmarks.machine import describe_machine, load
from benchmarks.ranks import ENVIRONMENT
from benchmarks.rates import Extent
from benchmarks.report import show
from benchmarks.row import Row
from benchmarks.settings import cores
from benchmarks.shapes import SHAPES, TINY, deep
from benchmarks.trainee import describe, rates, train, try_steps
from lightning_gemini.core.machine import available_bytes

SECTIONS = (*SHAPES, "largest", "sanitizer")

_WIDTH = 190  # of a pipe, where nobody says
_MINUTES = 8.0
_ROUNDS = 2
_LEAST_SECONDS = 5.0  # with less nothing is begun
_JOB_SECONDS = 300.0  # the most that one contender may take in one round
_SANITIZER_SECONDS = 60.0  # for each tool
_SEARCH_SHARE = 0.4  # of the time that is left, for each mode of the search for the largest model

#: Where the rest comes in between the contenders: behind so many of them.
_VALUABLE = 5

_MIB = 2**20


@dataclass(frozen=True)
class Clock:
    """Time that runs out."""

    deadline: float

    def left(self, most: float = float("inf")) -> float:
        """Seconds that are left, but no more than ``most``."""
        return max(0.0, min(most, self.deadline - time.monotonic()))

    def over(self) -> bool:
        """Whether there is too little to begin anything."""
        return self.left() < _LEAST_SECONDS


@dataclass(frozen=True)
class Options:
    """The command line."""

    dry_cpu: bool
    only: tuple[str, ...]
    out: Path | None
    minutes: float
    rounds: int


class Run:
    """One run: does what is asked in the order of its worth, and keeps the findings."""

    def __init__(self, options: Options, console: Console) -> None:
        self._options, self._console = options, console
        self._shapes = TINY if options.dry_cpu else SHAPES
        self._clock = Clock(time.monotonic() + 60 * options.minutes)
        self._machine, device = machine_of(options.dry_cpu)
        head = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "settings": {**vars(options), "out": None},
            "load": {"before": load(), "after": load()},
        }
        self.findings = Findings(head, device, not options.dry_cpu, self._shapes["opt-13b"])

    def all(self) -> Findings:
        """Everything that ``only`` asks for."""
        options = self._options
        self._rates()
        rows = [
            Row(job, problem="not run: the run was cut before")
            for job in jobs(self._shapes, options.only, tiny=options.dry_cpu)
        ]
        self.findings.rows = rows
        first, rest = rows[:_VALUABLE], rows[_VALUABLE:]
        clipping, *others = MODES
        self._round(0, first)
        self._search(clipping)
        self._sanitizers()
        self._round(0, rest)
        for mode in others:
            self._search(mode)
        for number in range(1, options.rounds):
            self._round(number, [row for row in rows if row.problem is None])
        return self.findings

    def save(self) -> tuple[Path, ...]:
        """Writes the findings, if anything is to be written."""
        self.findings.head["load"]["after"] = load()
        return () if self._options.out is None else self.findings.write(self._options.out)

    def _rates(self) -> None:
        extent = Extent(copy=4 * _MIB, matmul=256, update=2**18, repeats=3) if self._options.dry_cpu else Extent()
        limit = self._clock.left(_JOB_SECONDS)
        self._console.log("the machine's rates")
        done = run_child(rates, self._machine.device, extent, timeout=limit, threads=self._machine.threads)
        self.findings.rates = None if done.value is None else Rates(**done.value)
        self.findings.rates_problem = done.error
        self.save()

    def _round(self, number: int, rows: Sequence[Row]) -> None:
        for row in in_round(rows, number):
            if (reason := does_not_fit(row.job, self._machine)) is not None:
                row.problem = reason
            elif self._clock.over():
                row.problem = None if row.rounds else "not run: no time was left"
            else:
                self._train(row, number)
            self.save()

    def _train(self, row: Row, number: int) -> None:
        self._console.log(f"round {number + 1}: {row.job.label}")
        limit = self._clock.left(_JOB_SECONDS)
        done = run_child(train, row.job, self._machine, timeout=limit, threads=self._machine.threads)
        row.add(number, done)
        if done.error is not None:
            self._console.log(f"  {done.error}", markup=False)

    def _search(self, mode: Mode) -> None:
        if "largest" not in self._options.only:
            return
        reasons = self.findings.reasons[mode.name] = []
        until = Clock(time.monotonic() + _SEARCH_SHARE * self._clock.left())
        width_of = self._shapes["opt-13b"]

        def trains(depth: int) -> bool | None:
            shape = deep(width_of, depth)
            limit = self._clock.left(_JOB_SECONDS)
            self._console.log(f"largest model {mode.name}: {shape.name}, {depth} layers")
            done = run_child(try_steps, mode.job(shape), self._machine, timeout=limit, threads=self._machine.threads)
            if done.error is not None:
                reasons.append(f"{depth}: {done.error}")
            unknown = done.error is not None and done.seconds >= limit
            return None if unknown else done.error is None

        def more() -> bool:
            self.save()
            return not until.over() and not self._clock.over()

        first, most = depths(mode, width_of, self._machine)
        found: Search = largest_depth(trains, first, most, more)
        self.findings.searches[mode.name] = found
        self.save()

    def _sanitizers(self) -> None:
        if "sanitizer" in self._options.only:
            self._console.log("sanitizers")
            self.findings.sanitizers = sanitizer.check(
                lambda: self._clock.left(_SANITIZER_SECONDS), not self._options.dry_cpu
            )
            self.save()


def in_round(rows: Sequence[Row], number: int) -> Iterator[Row]:
    """``rows`` in their order; in every second round the contenders of a workload in reverse."""
    for _, group in groupby(rows, key=lambda row: row.job.group):
        alike = list(group)
        yield from reversed(alike) if number % 2 else alike


def machine_of(dry_cpu: bool) -> tuple[Machine, str]:
    """This machine and its device's name; for a dry run a small emulated device beside a small host.

    Raises:
        RuntimeError: the device does not answer.
    """
    threads = cores()
    found = run_child(describe, "cpu" if dry_cpu else "cuda", timeout=_JOB_SECONDS, threads=threads)
    if found.value is None:
        raise RuntimeError(f"the device cannot be used: {found.details}")
    if dry_cpu:
        machine = Machine("cpu", 1 * _MIB, 8 * _MIB, None, None, max(1, threads // 2), warmup=2, steps=2)
    else:
        machine = Machine("cuda", None, None, found.value["total"], available_bytes(torch.device("cpu")), threads)
    return machine, found.value["name"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; the exit status."""
    options = _parse(arguments)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    console = Console()
    console.width = max(console.width, _WIDTH)
    if not options.dry_cpu and not torch.cuda.is_available():
        console.print("There is no CUDA device here. Try the same paths small with --dry-cpu.")
        return 2
    if options.dry_cpu:
        console.print(DRY)
    run = Run(options, console)
    try:
        run.all()
    except KeyboardInterrupt:
        console.print("stopped; what was found so far:")
    for table in reversed(run.findings.tables()):
        show(table, console)
    if options.dry_cpu:
        console.print(DRY)
    console.print(*(str(path) for path in run.save()), soft_wrap=True)
    return 0


def _parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measures the engine on one GPU against the limits of the machine."
    )
    parser.add_argument("--dry-cpu", action="store_true", help="the same paths small, on the CPU: only that they run")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
        help=f"some of {', '.join(SECTIONS)}",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="where the files go (default benchmarks/results; nowhere with --dry-cpu)"
    )
    parser.add_argument("--minutes", type=_positive, default=_MINUTES, help="for everything (default %(default)g)")
    parser.add_argument(
        "--rounds", type=int, choices=range(1, 31), default=None, metavar="N",
        help=f"how often each contender is started (default {_ROUNDS}, with --dry-cpu 1)",
    )  # fmt: skip
    found = parser.parse_args(arguments)
    out = found.out if found.dry_cpu or found.out is not None else Path("benchmarks", "results")
    rounds = found.rounds or (1 if found.dry_cpu else _ROUNDS)
    return Options(found.dry_cpu, tuple(found.only), out, found.minutes, rounds)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
