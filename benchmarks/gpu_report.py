"""What a run on a GPU has found so far, as tables and as files that are written anew after each contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.floor import Rates
from benchmarks.goals import GOALS, judge, measured
from benchmarks.largest import MODES, Search
from benchmarks.report import write
from benchmarks.result import Record, Result, Table
from benchmarks.row import Row, figures
from benchmarks.shapes import Shape, deep
from lightning_gemini.core.timeline import Timeline

DRY = "dry run on the CPU: the figures say nothing about a GPU"

_GIB = 2**30
_STEM = "gpu"
_NONE = "-"


@dataclass
class Findings:
    """All that was found; ``head`` is what ``report.write`` wants."""

    head: Record
    device: str
    real: bool
    width_of: Shape
    rates: Rates | None = None
    rates_problem: str | None = None
    rows: list[Row] = field(default_factory=list)
    searches: dict[str, Search] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    sanitizers: list[Record] = field(default_factory=list)
    _drawn: tuple[Record | None, bytes | None] | None = None

    def figures(self) -> list[Record]:
        """The figures of all rows."""
        return [figures(row, self.rates, self.rows) for row in self.rows]

    def largest(self) -> dict[str, float]:
        """Parameters of the largest model that trained, by mode, 0 if none did."""
        return {
            mode: float(deep(self.width_of, search.best).parameters) if search.best else 0.0
            for mode, search in self.searches.items()
            if any(outcome is not None for _, outcome in search.tried)
        }

    def tables(self) -> list[Table]:
        """Everything, for people."""
        numbers = self.figures()
        return [
            _goals(measured(numbers, self.largest()), self.real),
            _machine(self.device, self.rates, self.rates_problem, self.real),
            _training(numbers),
            _largest(self),
            _sanitizers(self.sanitizers),
        ]

    def record(self) -> Record:
        """Everything, for programs."""
        return {
            "benchmark": _STEM,
            "device": self.device,
            "real": self.real,
            "rates": None if self.rates is None else asdict(self.rates),
            "contenders": [{**one, **_raw(row)} for one, row in zip(self.figures(), self.rows, strict=True)],
            "largest": [
                {"name": mode, **asdict(search), "reasons": self.reasons.get(mode, [])}
                for mode, search in self.searches.items()
            ],
            "sanitizers": self.sanitizers,
            "goals": {
                name: {"goal": GOALS[name].text, "value": value, "verdict": judge(name, value, self.real)}
                for name, value in measured(self.figures(), self.largest()).items()
            },
        }

    def picture(self) -> bytes | None:
        """The step that moved the most, with device and date; ``None`` where none was written down."""
        drawn = [row for row in self.rows if row.result and row.result["timeline"]]
        if not drawn:
            return None
        row = max(drawn, key=lambda one: one.result["plan"]["fetched"] if one.result else 0)
        timeline = Timeline.from_json(str((row.result or {})["timeline"]))
        if not timeline.moments:
            return None
        title = f"{row.job.label}, {self.device}, {self.head['date'][:10]}"
        if self._drawn is None or self._drawn[0] is not row.result:
            self._drawn = row.result, draw(replace(timeline, kind=title if self.real else f"{title} (dry run)"))
        return self._drawn[1]

    def write(self, folder: Path) -> tuple[Path, ...]:
        """Writes ``gpu.md``, ``gpu.json`` and, where there is a step to be drawn, ``gpu.png``."""
        goals, *others = self.tables()
        results = [Result(goals, self.record(), self.picture()), *(Result(table, {}) for table in others)]
        return write(folder, _STEM, self.head, results)


def draw(timeline: Timeline) -> bytes | None:
    """``timeline`` as a PNG; ``None`` without matplotlib."""
    from lightning_gemini.core import ConfigurationError
    from lightning_gemini.picture import figure

    file = BytesIO()
    try:
        figure(timeline).savefig(file, format="png", dpi=150, metadata={"Software": None})
    except ConfigurationError:
        return None
    return file.getvalue()


def _raw(row: Row) -> Record:
    result = {key: value for key, value in (row.result or {}).items() if key not in ("timeline", "seconds")}
    job = {key: value for key, value in asdict(row.job).items() if key != "name"}
    return {"job": job, "rounds": row.rounds, "pairs": row.clip_pairs, "result": result, "details": row.details}


def _goals(values: dict[str, float | None], real: bool) -> Table:
    rows = tuple(
        (GOALS[name].text, _text(value, GOALS[name].form), judge(name, value, real)) for name, value in values.items()
    )
    note = "What was aimed at, what was measured, and whether it is met." + (
        "" if real else f" {DRY[0].upper()}{DRY[1:]}."
    )
    return Table("Goals", note, ("goal", "measured", "verdict"), rows)


def _machine(device: str, rates: Rates | None, problem: str | None, real: bool) -> Table:
    title = f"What the machine does: {device}"
    if rates is None:
        return Table(title, f"Not measured: {problem or 'not yet'}.", ("what", "rate"), ())
    rows = (
        ("pinned host memory to the device, GB/s", f"{rates.h2d / 1e9:.1f}"),
        ("device to pinned host memory, GB/s", f"{rates.d2h / 1e9:.1f}"),
        ("both at a time, together, GB/s", f"{rates.duplex / 1e9:.1f}"),
        ("copy on the device, read and written, GB/s", f"{rates.device_copy / 1e9:.0f}"),
        ("bf16 matrix product, TFLOP/s", f"{rates.matmul / 1e12:.3g}"),
        ("copy in host memory, read and written, GB/s", f"{rates.host_copy / 1e9:.1f}"),
        ("AdamW on the host, G parameters/s", f"{rates.host_update / 1e9:.2f}"),
        ("AdamW on the host, GB/s (26 bytes per parameter)", f"{26 * rates.host_update / 1e9:.1f}"),
    )
    note = f"Medians, with {rates.threads} host threads." + ("" if real else " All copies are within host memory here.")
    return Table(title, note, ("what", "rate"), rows)


def _training(numbers: Sequence[Record]) -> Table:
    rows = []
    for one in numbers:
        floor = one["floor"]
        rows.append(
            (
                one["name"],
                _text(one["tokens_per_second"], "{:,.0f}"),
                _text(one["flops"], "{:.1f}", 1e12),
                _text(one["device_peak"] or None, "{:.2f}", _GIB),
                _text(one["host_peak"] or None, "{:.2f}", _GIB),
                _text(one["pinned"], "{:.2f}", _GIB),
                _text(one["seconds"], "{:.3f}"),
                _NONE if floor is None else f"{floor['seconds']:.3g} ({floor['bound']})",
                _text(one["of_the_floor"], "{:.2f}"),
                _text(one["speed_to_fsdp2"], "{:.2f}"),
                _text(one["hidden"], "{:.0%}"),
                _text(one["clip_cost"], "{:+.1%}"),
                _text(one["fragments"], "{:.2%}"),
                (one["problem"] or "").replace("|", "/"),
            )
        )
    note = (
        "Workload (sequences in a micro-batch x micro-batches in a step) and contender; each in processes of its own, "
        "interleaved in rounds; medians of timed steps with clipping. TFLOPS count 6 operations per parameter and "
        "token, and the attention. Peaks in GiB: the device's as its allocator says, the host's resident memory and "
        "what is pinned. The floor is that of the contender's own plan; `/ FSDP2` is how many times as fast; `hidden` "
        "is how much of the host's update nobody waited for; `clip` what clipping costs, in pairs of steps; "
        "`fragments` what the allocator could not give back, as a share of chunks."
    )
    columns = (
        "contender", "tokens/s", "TFLOPS", "device", "host", "pinned", "step, s", "floor, s", "of the floor", "/ FSDP2",
        "hidden", "clip", "fragments", "problem",
    )  # fmt: skip
    return Table("Training", note, columns, tuple(rows))


def _largest(findings: Findings) -> Table:
    rows = []
    for mode in MODES:
        search = findings.searches.get(mode.name)
        if search is None:
            rows.append((mode.name, _NONE, _NONE, _NONE, "not measured"))
            continue
        reasons = findings.reasons.get(mode.name, [])
        rows.append(
            (
                mode.name,
                f"{deep(findings.width_of, search.best).parameters / 1e9:.4g}B" if search.best else "none",
                str(search.best),
                " ".join(f"{depth}:{_OUTCOMES[outcome]}" for depth, outcome in search.tried),
                ("searched to the end" if search.finished else "cut") + (f"; {reasons[-1]}" if reasons else ""),
            )
        )
    note = (
        f"Decoders of width {findings.width_of.width}, one sequence of {findings.width_of.length} tokens, activation "
        "checkpointing; a depth trains if a recorded step and one by plan end, update included. Tried depths in order."
    )
    rows = [tuple(cell.replace("|", "/") for cell in row) for row in rows]
    return Table(
        "The largest model that trains", note, ("mode", "parameters", "layers", "tried", "search"), tuple(rows)
    )


_OUTCOMES: dict[Any, str] = {True: "trains", False: "does not", None: "no time"}


def _sanitizers(records: Sequence[Record]) -> Table:
    rows = tuple((one["tool"], one["outcome"]) for one in records) or (("all", "not run"),)
    note = "A small model whose every chunk is copied both ways on streams of its own, under sanitizers."
    return Table("Copy streams", note, ("tool", "outcome"), rows)


def _text(value: float | None, form: str, unit: float = 1) -> str:
    return _NONE if value is None else form.format(value / unit)
