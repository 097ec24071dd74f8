"""A timeline as a picture: device memory, the place of each chunk, copies and waits, over the moments of one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.memory import format_bytes
from lightning_gemini.core.timeline import Place, Timeline, TimelineChunk

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What `draw` can write, by the file's suffix.
SUFFIXES = (".png", ".pdf", ".svg")

# The palette of Okabe and Ito ("Color Universal Design", 2008), which people with any colour vision tell apart; black
# and greys beside it.
_BLUE, _SKY, _ORANGE, _VERMILLION, _PURPLE = "#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#cc79a7"
_GREEN = "#009e73"
_LIGHT, _GREY, _DARK, _SHADE = "#e6e6e6", "#a6a6a6", "#333333", "#f2f2f2"

_PLACES = {
    Place.HOST: ("in host memory", _LIGHT),
    Place.DEVICE: ("home on the device", _BLUE),
    Place.UPDATING: ("in host memory, being updated", _GREEN),
    Place.COMING: ("coming", _ORANGE),
    Place.RESIDENT: ("unsharded, idle", _SKY),
    Place.IN_USE: ("unsharded, in use", _VERMILLION),
}
#: The areas of the memory panel from the bottom: a field of `DeviceBytes`, and how it is called and coloured.
_AREAS = {
    "homes": ("homes on the device", _BLUE),
    "in_use": _PLACES[Place.IN_USE],
    "idle": _PLACES[Place.RESIDENT],
    "coming": _PLACES[Place.COMING],
    "other": ("gradients, activations", _GREY),
}

_WIDTH, _DPI = 10, 200  # inches, dots per inch
_MEMORY_HEIGHT, _COPIES_HEIGHT, _WAITS_HEIGHT, _MARGIN = 2.4, 1.1, 0.7, 1.3  # inches
_CHUNK_HEIGHT, _MIN_MAP, _MAX_MAP = 0.19, 0.6, 4.5  # inches: one chunk at the most, all of them
#: Rows and columns that the map's dots can still show; of more, neighbours share one.
_MAP_ROWS, _MAP_COLUMNS = 800, 1200
_NAME_LENGTH = 30  # characters
_HIGHEST_BUDGET = 2.5  # peaks; a higher one would leave no room for them
_BAR, _MOST_BARS = 0.8, 600  # a bar's width in moments, or as a share of the axis where that would be too thin
_BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
_SECONDS = {"s": 1, "ms": 1e-3, "µs": 1e-6}
_NARROWEST_LABEL = 0.09  # of the width, for "backward"
_STYLE = {
    "font.size": 8.5, "figure.titlesize": 10, "axes.linewidth": 0.6, "axes.edgecolor": _DARK, "legend.frameon": False,
    "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "pdf.fonttype": 42, "svg.fonttype": "none",
}  # fmt: skip


def draw(timeline: Timeline, path: Path) -> None:
    """Draws ``timeline`` into the file ``path``: PNG, PDF or SVG, by its suffix.

    Raises:
        ConfigurationError: the suffix is another one, there are no moments, or matplotlib is missing.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"the picture's file must end in {', '.join(SUFFIXES)}, got {path.name!r}.")
    with _style():
        figure(timeline).savefig(path, dpi=_DPI)


def figure(timeline: Timeline) -> Figure:
    """The picture of ``timeline`` as a matplotlib figure with four axes, which share the moments as their abscissa.

    Device memory as a stack of areas with the budget, the chunk map with the palette of :class:`Place`, bytes copied
    from (up) and to (down) the host, and seconds waited. All quantities are in bytes and seconds.

    Raises:
        ConfigurationError: there are no moments, or matplotlib is missing.
    """
    if not timeline.moments:
        raise ConfigurationError("nothing to draw: the timeline has no moments, so no chunk moved in this step.")
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        heights = _MEMORY_HEIGHT, _map_height(timeline), _COPIES_HEIGHT, _WAITS_HEIGHT
        result = Figure(figsize=(_WIDTH, sum(heights) + _MARGIN), layout="constrained")
        axes = result.subplots(4, sharex=True, height_ratios=heights)
        for ax, panel in zip(axes, (_memory, _chunk_map, _copies, _waits), strict=True):
            ax.spines[["top", "right"]].set_visible(False)
            panel(ax, timeline)
        result.suptitle(_title(timeline), x=0.01, ha="left", linespacing=1.4, parse_math=False)
        axes[-1].set_xlim(-0.5, len(timeline.moments) - 0.5)
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes[-1].set_xlabel("moment (each begins when a unit needs a chunk)")
    return result


def _style() -> AbstractContextManager[None]:
    """A context in which matplotlib has this module's style, whatever the user's own is.

    Raises:
        ConfigurationError: matplotlib is missing.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise ConfigurationError(
            f"the picture needs matplotlib: pip install 'lightning-gemini[report]' (importing it failed: {error})."
        ) from None
    return style.context(["default", _STYLE])


def _title(timeline: Timeline) -> str:
    fetched = sum(moment.fetched for moment in timeline.moments)
    offloaded = sum(moment.offloaded for moment in timeline.moments)
    waited = sum(moment.waited for moment in timeline.moments)
    chunks = f"{len(timeline.chunks)} chunk{'s' if len(timeline.chunks) != 1 else ''}"
    predicted = ""
    if timeline.predicted is not None:
        predicted = f" ({_seconds(timeline.predicted)} predicted up to the next step)"
    return (
        f"{timeline.kind}: rank {timeline.rank} of {timeline.world_size}, {chunks}\n"
        f"{format_bytes(fetched)} fetched from the host, {format_bytes(offloaded)} offloaded; "
        f"{_seconds(timeline.seconds)}{predicted}, "
        f"{f'of which {_seconds(waited)}' if waited else 'none of it'} waiting for chunks"
        f"{_hidden(timeline)}"
    )


def _hidden(timeline: Timeline) -> str:
    share = timeline.update_hidden_share
    if share is None:
        return ""
    return f"\n{_seconds(timeline.update_seconds)} of updates in host memory, {share:.0%} hidden behind other work"


def _memory(ax: Axes, timeline: Timeline) -> None:
    """Device memory as a stack, the budget, the peak, and which moments are of the backward."""
    import numpy as np

    count = len(timeline.moments)
    stacks = [timeline.device_bytes(moment) for moment in range(count)]
    edges = np.arange(count + 1) - 0.5
    bottom = np.zeros(count)
    for name, (label, colour) in _AREAS.items():
        top = bottom + [getattr(stack, name) for stack in stacks]
        if (top > bottom).any():
            ax.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=label, linewidth=0)
        bottom = top
    _shade_backward(ax, timeline)
    ax.stairs(bottom, edges, baseline=None, color=_DARK, linewidth=0.6)
    peak = int(bottom.argmax())
    highest = max(_draw_budget(ax, timeline.capacity, bottom[peak]), bottom[peak], 1)
    _mark_peak(ax, timeline, peak, bottom[peak], 1.1 * highest)
    _name_phases(ax, timeline)
    _scale(ax, "device memory", 0, 1.25 * highest, _BYTES)
    _legend(ax, reverse=True)


def _draw_budget(ax: Axes, capacity: int | None, peak: float) -> float:
    """Draws the budget as a line and returns its height, 0 where there is none or it would dwarf the rest."""
    if capacity is None:
        return 0
    look = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.1}
    if capacity > _HIGHEST_BUDGET * peak:
        ax.plot([], [], label=f"budget {format_bytes(capacity)},\nabove this scale", **look)
        return 0
    ax.axhline(capacity, label=f"budget {format_bytes(capacity)}", **look)
    return capacity


def _mark_peak(ax: Axes, timeline: Timeline, moment: int, height: float, text_height: float) -> None:
    share = (moment + 0.5) / len(timeline.moments)
    side, arrow = ("left", 0) if share < 1 / 3 else ("center", 0.5) if share < 2 / 3 else ("right", 1)
    (unit,) = _short_names([timeline.moments[moment].reason, *(chunk.first for chunk in timeline.chunks)], [0])
    ax.annotate(
        f"peak {format_bytes(height)} at moment {moment} ({unit})",
        xy=(moment, height), xytext=(moment, text_height), ha=side, va="bottom", parse_math=False,
        arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0,
            "relpos": (arrow, 0)},
    )  # fmt: skip


def _phases(timeline: Timeline) -> Iterator[tuple[bool, int, int]]:
    """Runs of moments: whether they are of the backward, the first one, and the one behind the last."""
    end = 0
    for backward, run in groupby(moment.backward for moment in timeline.moments):
        start, end = end, end + sum(1 for _ in run)
        yield backward, start, end


def _name_phases(ax: Axes, timeline: Timeline) -> None:
    for backward, start, end in _phases(timeline):
        if end - start >= _NARROWEST_LABEL * len(timeline.moments):
            ax.text(
                (start + end - 1) / 2, 1.01, "backward" if backward else "forward", ha="center", va="bottom",
                style="italic", transform=ax.get_xaxis_transform(),
            )  # fmt: skip


def _shade_backward(ax: Axes, timeline: Timeline) -> None:
    for backward, start, end in _phases(timeline):
        if backward:
            ax.axvspan(start - 0.5, end - 0.5, color=_SHADE, linewidth=0, zorder=0)


def _chunk_map(ax: Axes, timeline: Timeline) -> None:
    """A row for each chunk, a column for each moment, the colour says where the chunk is."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows, columns = len(timeline.chunks), len(timeline.moments)
    cells = np.array([[place.value for place in timeline.places(m)] for m in range(columns)], np.uint8).T
    ax.imshow(
        _at_most(_at_most(cells, _MAP_ROWS, 0), _MAP_COLUMNS, 1),
        cmap=ListedColormap([colour for _, colour in _PLACES.values()]), vmin=-0.5, vmax=len(Place) - 0.5,
        aspect="auto", interpolation="nearest", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
    )  # fmt: skip
    if rows <= _MAX_MAP / _CHUNK_HEIGHT:
        ax.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=0.8)
    shown = range(0, rows, _label_step(rows))
    ax.set_yticks(shown, _chunk_labels(timeline.chunks, shown), parse_math=False)
    ax.set_ylabel("chunk, by its first parameter" if rows > 9 else "chunk")  # as much as is room for
    present = {Place(value) for value in np.unique(cells)}
    _legend(ax, [Patch(color=colour, label=label) for place, (label, colour) in _PLACES.items() if place in present])


def _at_most(cells: np.ndarray, count: int, axis: int) -> np.ndarray:
    """``cells`` with ``count`` rows or columns at the most; of neighbours that share one, the highest value counts."""
    import numpy as np

    if cells.shape[axis] <= count:
        return cells
    return np.maximum.reduceat(cells, np.arange(count) * cells.shape[axis] // count, axis=axis)


def _map_height(timeline: Timeline) -> float:
    return min(max(_CHUNK_HEIGHT * len(timeline.chunks), _MIN_MAP), _MAX_MAP)


def _label_step(rows: int) -> int:
    """The round number of chunks from one label to the next that leaves room for the text."""
    steps = (factor * 10**power for power in range(10) for factor in (1, 2, 5))
    return next(step for step in steps if rows / step <= _MAX_MAP / _CHUNK_HEIGHT)


def _chunk_labels(chunks: Sequence[TimelineChunk], shown: Sequence[int]) -> list[str]:
    names = _short_names([chunk.first for chunk in chunks], shown)
    return [f"{name}{'' if chunks[i].trained else ', frozen'}  {i}" for name, i in zip(names, shown, strict=True)]


def _copies(ax: Axes, timeline: Timeline) -> None:
    """Bytes fetched as bars upwards, offloaded downwards."""
    _shade_backward(ax, timeline)
    width = max(_BAR, len(timeline.moments) / _MOST_BARS)
    extreme = {}
    for name, sign, colour in (("fetched", 1, _ORANGE), ("offloaded", -1, _PURPLE)):
        copied = {i: n for i, moment in enumerate(timeline.moments) if (n := getattr(moment, name))}
        if copied:
            heights = [sign * nbytes for nbytes in copied.values()]
            ax.bar(list(copied), heights, width, color=colour, linewidth=0, label=name, snap=False)
        extreme[name] = max(copied.values(), default=0)
    if not any(extreme.values()):
        _nothing(ax, "copied", "no bytes fetched or offloaded")
        return
    ax.axhline(0, color=_DARK, linewidth=0.6)
    _scale(ax, "copied", -1.1 * extreme["offloaded"], 1.1 * extreme["fetched"], _BYTES)
    _legend(ax)


def _waits(ax: Axes, timeline: Timeline) -> None:
    """Seconds waited as marks."""
    _shade_backward(ax, timeline)
    waited = {index: moment.waited for index, moment in enumerate(timeline.moments) if moment.waited}
    if not waited:
        _nothing(ax, "waited", "no unit waited for its chunk")
        return
    ax.vlines(list(waited), 0, list(waited.values()), color=_DARK, linewidth=0.7)
    ax.plot(
        list(waited),
        list(waited.values()),
        "o",
        color="black",
        markersize=3 if len(timeline.moments) <= _MOST_BARS else 1.5,
    )
    _scale(ax, "waited", 0, 1.15 * max(waited.values()), _SECONDS, ticks=3)


def _nothing(ax: Axes, label: str, text: str) -> None:
    """Says in an empty panel that it is empty on purpose."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", style="italic", color=_DARK)
    ax.set_yticks([])
    ax.set_ylabel(label)


def _scale(ax: Axes, label: str, low: float, high: float, units: Mapping[str, float], ticks: int = 6) -> None:
    """An ordinate from ``low`` to ``high`` with round numbers of the largest unit that suits."""
    from matplotlib.ticker import MaxNLocator

    name, unit = next(((n, u) for n, u in units.items() if max(high, -low) >= u), list(units.items())[-1])
    values = MaxNLocator(ticks, steps=[1, 2, 5, 10]).tick_values(low / unit, high / unit)
    inside = [value for value in values if low <= value * unit <= high]
    ax.set_ylim(low, high)
    ax.set_yticks([value * unit for value in inside], [f"{abs(value):g}" for value in inside])
    ax.set_ylabel(f"{label} ({name})")


def _legend(ax: Axes, handles: Sequence[Artist] | None = None, reverse: bool = False) -> None:
    ax.legend(
        handles=handles, reverse=reverse, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, handlelength=1.6
    )


def _short_names(names: Sequence[str], shown: Iterable[int]) -> list[str]:
    """Some of ``names`` without the modules that all have in common, and without the middle where they are long."""
    paths = [name.split(".") for name in names]
    common = 0
    if len(set(names)) > 1:
        modules = zip(*(path[:-1] for path in paths), strict=False)  # up to the shortest
        common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, modules))
    if common and any(path[common].isdigit() for path in paths):
        common -= 1  # "layers" stays with its number
    return [_elide(paths[index][common:]) for index in shown]


def _elide(path: Sequence[str]) -> str:
    """``layers.3...k_proj.weight``: which layer it is stands in front, what it is at the end."""
    if len(".".join(path)) <= _NAME_LENGTH:
        return ".".join(path)
    for kept in range(3, len(path)):
        text = f"{'.'.join(path[:2])}...{'.'.join(path[kept:])}"
        if len(text) <= _NAME_LENGTH:
            return text
    return f"...{'.'.join(path)[3 - _NAME_LENGTH :]}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
