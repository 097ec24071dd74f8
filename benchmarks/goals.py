"""The goals, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.result import Record

Verdict = Literal["met", "not met", "not measured"]


@dataclass(frozen=True)
class Goal:
    """What is aimed at.

    Attributes:
        text: the goal, for people.
        reached: whether a value reaches it.
        form: the value for people.
    """

    text: str
    reached: Callable[[float], bool]
    form: str


#: By name. Shares are of 1; parameters are in billions.
GOALS = {
    "floor": Goal("at least 0.85 of the floor, the least of all `auto` rows", lambda value: value >= 0.85, "{:.2f}"),
    "fsdp2": Goal("at least 2x FSDP2's offload, the least of all `auto` rows", lambda value: value >= 2, "{:.2f}x"),
    "with clipping": Goal("14B train with clipping on 80 GB + 128 GB", lambda value: value >= 14, "{:.1f}B"),
    "in backward": Goal("16B train with updates in the backward", lambda value: value >= 16, "{:.1f}B"),
    "bf16 states, with clipping": Goal("16B train with bf16 states", lambda value: value >= 16, "{:.1f}B"),
    "clipping": Goal("clipping costs at most 2%, the most of all `auto` rows", lambda value: value <= 0.02, "{:.1%}"),
    "fragments": Goal("fragments under 3% of chunk bytes, the most of all rows", lambda value: value < 0.03, "{:.1%}"),
}


def measured(figures: Sequence[Record], largest: dict[str, float]) -> dict[str, float | None]:
    """The value of each goal, ``None`` where it was not measured.

    Args:
        figures: of all rows; those of ``auto`` count.
        largest: parameters of the largest model that trained, by mode; 0 if none did.
    """
    auto = [one for one in figures if one["name"].endswith(" auto")]

    def of(key: str, rows: Sequence[Record], pick: Callable[[Sequence[float]], float]) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return pick(values) if values else None

    found = {
        "floor": of("of_the_floor", auto, min),
        "fsdp2": of("speed_to_fsdp2", auto, min),
        "clipping": of("clip_cost", auto, max),
        "fragments": of("fragments", figures, max),
    }
    sizes = {mode: parameters / 1e9 for mode, parameters in largest.items()}
    return {name: sizes.get(name, found.get(name)) for name in GOALS}


def judge(name: str, value: float | None, real: bool) -> Verdict:
    """Whether goal ``name`` is reached; what a dry run gives (``real`` is false) decides nothing."""
    if value is None or not real:
        return "not measured"
    return "met" if GOALS[name].reached(value) else "not met"
