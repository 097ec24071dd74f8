"""``python -m benchmarks``: runs the benchmarks and writes what they found."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks import checkpoint, hooks, memory, optimizer, overlap, placement, step
from benchmarks.machine import describe_machine, load
from benchmarks.report import show, write
from benchmarks.result import Result
from benchmarks.settings import Settings, quick

NAMES = ("step", "hooks", "memory", "optimizer", "placement", "overlap", "checkpoint")
_BY_DEFAULT = NAMES[:-1]  # that one writes gigabytes, to be asked for
_ONE_RANK = ("optimizer", "placement", "overlap")
_QUICK_PAIRS = 3
_WIDTH = 130  # of a pipe, where nobody says


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    options = _parse(arguments)
    settings = quick(options.pairs or _QUICK_PAIRS) if options.quick else Settings(pairs=options.pairs or 30)
    console = Console()
    console.width = max(console.width, _WIDTH)
    before, started = load(), datetime.now(UTC)
    results: list[Result] = []
    for name in _BY_DEFAULT if options.only is None else (options.only,):
        for ranks in (1,) if name in _ONE_RANK else settings.ranks:
            console.log(f"{name}, {ranks} rank(s)")
            for result in _run(name, settings, ranks):
                show(result.table, console)
                results.append(result)
    head = {
        "date": started.isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": {**asdict(settings), "quick": options.quick, "only": options.only},
        "load": {"before": before, "after": load()},
    }
    paths = write(options.out, options.only or "benchmarks", head, results)
    console.print(*(str(path) for path in paths), soft_wrap=True)


def _run(name: str, settings: Settings, ranks: int) -> list[Result]:
    if name in ("memory", "checkpoint"):
        return {"memory": memory, "checkpoint": checkpoint}[name].run(settings, ranks)
    modules = {"step": step, "hooks": hooks, "optimizer": optimizer, "placement": placement, "overlap": overlap}
    return [modules[name].run(settings, ranks)]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures what the engine costs.")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds: only that everything runs")
    parser.add_argument("--only", choices=NAMES, help="one benchmark instead of all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks", "results"), help="where the files go")
    parser.add_argument("--pairs", type=_positive, help="samples of each contender (default 30, quick 3)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    main()
