"""What the planner's homes and residency leave to move, beside the best static split, on an OPT's order of units."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch

from benchmarks.estimate import median
from benchmarks.result import Record, Result, Table
from benchmarks.settings import Settings
from lightning_gemini.core import Layout, ParamSpec, plan_layout
from lightning_gemini.core.planner import DoesNotFitError, plan
from lightning_gemini.core.step_plan import ChunkBytes
from lightning_gemini.core.trace import Moment, Trace

#: Device sizes of the table, and those of the picture beside them, in percent of what everything needs.
PERCENT = (100, 70, 50, 30, 15)
_CURVE = tuple(range(6, 105, 2))

#: Up to so many chunks every subset is tried as a static split.
_FEW_CHUNKS = 12

_GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """An OPT with tied embeddings; 1.3B parameters as it stands here."""

    layers: int = 24
    width: int = 2048
    vocabulary: int = 50272
    length: int = 2048

    def units(self) -> list[tuple[str, list[tuple[int, ...]]]]:
        """Modules that own parameters, in the order in which transformers defines them: names and shapes."""
        n = self.width
        norm = [(n,), (n,)]
        units: list[tuple[str, list[tuple[int, ...]]]] = [
            ("embed_tokens", [(self.vocabulary, n)]),
            ("embed_positions", [(self.length + 2, n)]),
            ("final_norm", [*norm]),
        ]
        for layer in range(self.layers):
            units += [(f"{layer}.{name}", [(n, n), (n,)]) for name in ("k", "v", "q", "out")]
            units += [(f"{layer}.attention_norm", [*norm])]
            units += [(f"{layer}.fc1", [(4 * n, n), (4 * n,)]), (f"{layer}.fc2", [(n, 4 * n), (n,)])]
            units += [(f"{layer}.norm", [*norm])]
        return units

    def forward(self) -> list[str]:
        """Units in the order of a forward; the head is the embedding."""
        names = ("attention_norm", "q", "k", "v", "out", "norm", "fc1", "fc2")
        layers = [f"{layer}.{name}" for layer in range(self.layers) for name in names]
        return ["embed_tokens", "embed_positions", *layers, "final_norm", "embed_tokens"]


def layout_of(shape: Shape) -> tuple[Layout, dict[str, list[int]]]:
    """The chunks in bf16, and the chunks of each unit."""
    specs, owners = [], []
    for unit, shapes in shape.units():
        for index, size in enumerate(shapes):
            stride = tuple(torch.empty(size, device="meta").stride())
            specs.append(ParamSpec(f"{unit}.{index}", size, stride, torch.bfloat16, True, 0, 0))
            owners.append(unit)
    layout = plan_layout(specs, world_size=1)
    chunks: dict[str, list[int]] = {}
    for param, unit in enumerate(owners):
        if (chunk := layout.place(param)[0]) not in chunks.setdefault(unit, []):
            chunks[unit].append(chunk)
    return layout, chunks


def bytes_of(layout: Layout) -> list[ChunkBytes]:
    """AdamW on one rank: parameter, split master and gradient in 2 bytes each, two states in 4."""
    return [
        ChunkBytes(
            full=2 * chunk.numel, kept=14 * chunk.numel, hosted=14 * chunk.numel, fetch=2 * chunk.numel, gather=0,
            offload=2 * chunk.numel, trained=True, whole=True,
        )
        for chunk in layout.chunks
    ]  # fmt: skip


def trace_of(shape: Shape, chunks: dict[str, list[int]], full: Sequence[int]) -> Trace:
    """Forward, then the same backwards; a chunk's gradient buffer lives from its first to its last use there."""
    forward = shape.forward()
    moments: list[Moment] = []
    for step, unit in enumerate([*forward, *reversed(forward)]):
        backward = step >= len(forward)
        reason = f"the backward of {unit}" if backward else unit
        for index, chunk in enumerate(chunks[unit]):
            moments.append(Moment(chunk, reason, backward, tuple(sorted(chunks[unit][: index + 1]))))
    spans: dict[int, tuple[int, int]] = {}
    for t, moment in enumerate(moments):
        for chunk in moment.pinned if moment.backward else ():
            spans[chunk] = (spans.get(chunk, (t, t))[0], t)
    buffers = [sum(full[c] for c, (first, last) in spans.items() if first <= t <= last) for t in range(len(moments))]
    timed = [
        Moment(m.chunk, m.reason, m.backward, m.pinned, buffer) for m, buffer in zip(moments, buffers, strict=True)
    ]
    return Trace("training_step", tuple(timed), updates=True)


def best_split(trace: Trace, chunks: Sequence[ChunkBytes], device: int) -> int | None:
    """Bytes that the best static split moves; ``None`` if none fits.

    Some chunks have their home on the device; the others are fetched in the forward and again in the backward, and
    their gradients offloaded. Tried are all runs of consecutive chunks, of few chunks all subsets. No room for
    prefetching is asked for, only for what is in use at one time.
    """
    best = None
    for homes in _splits(len(chunks)):
        moved = sum(2 * c.fetch + c.offload for c, home in zip(chunks, homes, strict=True) if not home)
        if (best is None or moved < best) and _working_set(trace, chunks, homes) <= device:
            best = moved
    return best


def _splits(count: int) -> Iterator[Sequence[bool]]:
    if count <= _FEW_CHUNKS:
        yield from product((False, True), repeat=count)
        return
    for first in range(count):
        for stop in range(first, count + 1):
            yield [first <= index < stop for index in range(count)]


def _working_set(trace: Trace, chunks: Sequence[ChunkBytes], homes: Sequence[bool]) -> int:
    size = [0 if home else c.full for c, home in zip(chunks, homes, strict=True)]
    settled = sum(c.kept for c, home in zip(chunks, homes, strict=True) if home)
    return settled + max(sum([size[c] for c in moment.pinned]) + moment.other for moment in trace.moments)


@dataclass(frozen=True)
class Point:
    """One device size; bytes per step, ``None`` where it does not fit.

    Attributes:
        homes: chunks that the planner gives a home on the device.
        least: a lower bound for fetches with these homes, and the offloads.
        seconds: of a core, for one call of the planner; the median of a few.
    """

    percent: int
    device: int
    auto: int
    host: int
    static: int | None
    least: int
    homes: int
    seconds: float


def run(settings: Settings, ranks: int) -> Result:
    """Plans a training step for devices of several sizes."""
    shape = Shape(layers=2, width=128, vocabulary=1000, length=64) if settings.brief else Shape()
    layout, units = layout_of(shape)
    chunks = bytes_of(layout)
    trace = trace_of(shape, units, [chunk.full for chunk in chunks])
    everything = _working_set(trace, chunks, [True] * len(chunks))
    points = {}
    for percent in sorted({*PERCENT, *(() if settings.brief else _CURVE)}):
        if (point := measure(trace, chunks, percent, everything, settings.pairs)) is not None:
            points[percent] = point
    record = {
        "benchmark": "placement",
        "ranks": ranks,
        "threads": 1,
        "workload": {**asdict(shape), "chunks": len(chunks), "moments": len(trace.moments), "everything": everything},
        "contenders": [_record(name, points) for name in ("auto", "host", "static")],
    }
    described = f"OPT {sum(c.used for c in layout.chunks) / 1e9:.2g}B, {len(chunks)} chunks"
    table = _table([points[p] for p in PERCENT if p in points], described, len(trace.moments))
    return Result(table, record, draw(list(points.values()), described))


def measure(trace: Trace, chunks: Sequence[ChunkBytes], percent: int, everything: int, repeats: int) -> Point | None:
    """All contenders with so much of what everything needs; ``None`` where nothing fits."""
    device = everything * percent // 100
    seconds = []
    try:
        for _ in range(min(repeats, 3) if percent in PERCENT else 1):
            start = time.process_time()
            auto = plan([trace], chunks, device, None, homes="auto")
            seconds.append(time.process_time() - start)
    except DoesNotFitError:
        return None
    host = plan([trace], chunks, device, None, homes="host")
    step = auto.steps[0]
    return Point(
        percent,
        device,
        auto=step.moved,
        host=host.steps[0].moved,
        static=best_split(trace, chunks, device),
        least=step.least + step.offloaded,
        homes=sum(auto.on_device),
        seconds=median(seconds),
    )


def _record(name: str, points: dict[int, Point]) -> Record:
    record: Record = {
        "name": name,
        "percent": list(points),
        "device_bytes": [point.device for point in points.values()],
        "moved_bytes": [getattr(point, name) for point in points.values()],
    }
    if name == "auto":
        record["least_bytes"] = [point.least for point in points.values()]
        record["homes"] = [point.homes for point in points.values()]
        record["seconds"] = [point.seconds for point in points.values()]
    return record


def ratio_to_static(point: Point) -> float | None:
    """What the planner moves to what the best static split moves; 1 if neither moves anything."""
    if point.static:
        return point.auto / point.static
    return 1.0 if point.static == point.auto else None


def _table(points: Sequence[Point], described: str, moments: int) -> Table:
    rows = []
    for p in points:
        to_static = ratio_to_static(p)
        rows.append(
            (
                f"{p.percent}%",
                f"{p.device / _GIB:.2f}",
                str(p.homes),
                *(f"{nbytes / _GIB:.2f}" for nbytes in (p.auto, p.least, p.host)),
                "-" if p.static is None else f"{p.static / _GIB:.2f}",
                "-" if to_static is None else f"{to_static:.3f}",
                f"{p.seconds * 1e3:.0f}",
            )
        )
    return Table(
        f"Planned placement, {described}, {moments} moments",
        "GiB between host and device per training step, planned, by device size in percent of what everything needs: "
        "`auto`, the least with its homes, all homes in host memory (with residency), and the best static split, which "
        "gives a run of chunks a home on the device and fetches the others in forward and backward. Homes are those "
        "that `auto` puts on the device; ms are a core's for one call of the planner.",
        ("device", "GiB", "homes", "auto", "least", "host", "static", "auto / static", "ms"),
        tuple(rows),
    )


def draw(points: Sequence[Point], described: str) -> bytes:
    """Bytes moved against device size, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = (
        ("best static split", "static", "#b3541e", "--"),
        ("all homes in host memory", "host", "#7a7a7a", ":"),
        ("auto", "auto", "#1f5fa8", "-"),
    )
    for label, name, colour, style in lines:
        shown = [(p.percent, getattr(p, name) / _GIB) for p in points if getattr(p, name) is not None]
        # where two lines are one, the dots of the one show on the other
        axes.plot(*zip(*shown, strict=True), style, color=colour, linewidth=2, label=label, zorder=2 + (style == ":"))
    axes.set(xlim=(0, 105), xlabel="device memory, % of what everything needs", ylabel="moved per step, GiB")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Bytes between host and device per training step ({described})", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
