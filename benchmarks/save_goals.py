"""What saving and loading is to cost at the most, what was expected, and what came."""

from __future__ import annotations

from benchmarks.goals import Goal, Verdict
from benchmarks.result import Record

#: By name. Ratios; memory in chunks.
GOALS = {
    "save on disk": Goal("a save on disk without checksums takes at most as long as DCP's", lambda r: r <= 1, "{:.2f}"),
    "save in memory": Goal("the same where files are in memory", lambda r: r <= 1, "{:.2f}"),
    "load": Goal("a load without checksums takes at most as long as DCP's", lambda r: r <= 1, "{:.2f}"),
    "save, many": Goal("a save of 1,500 small parameters takes at most as long as DCP's", lambda r: r <= 1, "{:.2f}"),
    "load, many": Goal("a load of them takes at most as long as DCP's", lambda r: r <= 1, "{:.2f}"),
    "save memory": Goal("a save takes at most one chunk more memory", lambda chunks: chunks <= 1, "{:.2f}"),
    "load memory": Goal("a load takes at most one chunk more memory", lambda chunks: chunks <= 1, "{:.2f}"),
    "async memory": Goal("a save in the background its copy and at most one chunk", lambda n: n <= 1, "{:.2f}"),
    "standstill": Goal("a later save in the background stops training for 1.2 copies", lambda r: r <= 1.2, "{:.2f}"),
    "standstill, split": Goal("the same in bf16 with split masters", lambda r: r <= 1.2, "{:.2f}"),
}

#: What was written down before the first whole run, by number of ranks.
PREDICTED: dict[int, dict[str, str]] = {
    1: {
        "save on disk": "0.9",
        "save in memory": "0.5",
        "load": "0.6",
        "save, many": "0.5",
        "load, many": "0.9",
        "save memory": "1.0 (split masters are joined)",
        "load memory": "1.0",
        "async memory": "0.2",
        "standstill": "1.15",
        "standstill, split": "1.15",
    },
    2: {
        "save on disk": "0.9",
        "save in memory": "0.6",
        "load": "0.7",
        "save, many": "0.7",
        "load, many": "0.9",
        "save memory": "0.5",
        "load memory": "0.5",
        "async memory": "0.2",
        "standstill": "1.2",
        "standstill, split": "1.2",
    },
}


def judge(goal: Goal, came: Record | None, real: bool) -> Verdict:
    """Whether the median of ``came`` reaches a goal; what a quick run gives (``real`` is false) decides nothing."""
    if came is None or not real:
        return "not measured"
    return "met" if goal.reached(came["median"]) else "not met"
