"""One step as data: where chunks are, what memory is used for, and a file that is read back or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.timeline import FILE_NAME, DeviceBytes, Place, Timeline, file_name
from tests.timelines import MIB, small


def test_file_names() -> None:
    assert file_name(0) == FILE_NAME == "gemini_step.json"
    assert file_name(12) == "gemini_step-rank12.json"


def test_where_chunks_are() -> None:
    timeline = small()
    host, device, updating, coming, resident, in_use = Place
    assert [timeline.places(m) for m in range(4)] == [
        [in_use, coming, host, resident],
        [resident, in_use, coming, resident],
        [resident, in_use, in_use, resident],
        [host, device, in_use, in_use],
    ]
    first = replace(timeline.moments[2], updating=(0,), resident=(1, 2), pinned=(1, 2), coming=(0,))
    assert replace(timeline, moments=(first,)).places(0) == [updating, in_use, in_use, resident]
    assert all(timeline.place(c, m) is timeline.places(m)[c] for c in range(4) for m in range(4))


def test_what_device_memory_is_used_for() -> None:
    timeline = small()
    assert timeline.device_bytes(1) == DeviceBytes(9 * MIB, in_use=10 * MIB, idle=10 * MIB, coming=10 * MIB, other=MIB)
    assert timeline.device_bytes(1).total == 40 * MIB
    # a kept chunk is among the homes, in use or not
    assert timeline.device_bytes(3) == DeviceBytes(9 * MIB, in_use=10 * MIB, idle=0, coming=0, other=6 * MIB)


def test_how_much_of_the_update_is_hidden() -> None:
    assert small().update_hidden_share == 0.75
    assert replace(small(), update_waited=0.3).update_hidden_share == 0
    assert replace(small(), update_seconds=0.0).update_hidden_share is None


def test_the_parts_never_exceed_what_was_counted() -> None:
    timeline = small()
    short = replace(timeline, moments=(replace(timeline.moments[1], unsharded=15 * MIB),))
    assert short.device_bytes(0) == DeviceBytes(9 * MIB, in_use=10 * MIB, idle=0, coming=5 * MIB, other=MIB)


@pytest.mark.parametrize(
    "timeline",
    [
        small(),
        replace(small(), predicted=0.4),
        replace(small(), capacity=None, moments=()),
        replace(small(), report='ü "\n'),
    ],
)
def test_there_and_back(timeline: Timeline) -> None:
    text = timeline.to_json()
    assert json.loads(text)["format"] == 2
    assert Timeline.from_json(text) == timeline
    assert hash(Timeline.from_json(text)) == hash(timeline), "lists have become tuples"


def test_a_number_that_is_not_finite_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        replace(small(), seconds=float("nan")).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not parse: Expecting value"),
        (small().to_json()[:-20], "does not parse"),
        ("[" * 100_000, "does not parse"),
        ("[1]", "a JSON object with the field 'format'"),
        ('{"kind": "training"}', "a JSON object with the field 'format'"),
        ('{"format": 3}', r"in format 2, got format 3\. Read it with the version .* or follow a step again"),
        ('{"format": "1"}', "in format 2, got format '1'"),
        ('{"format": 1}', r"in format 2, got format 1"),
        ('{"format": 2}', r"the timeline lacks the field\(s\) kind, rank, world_size"),
    ],
)
def test_what_is_no_timeline_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        Timeline.from_json(text)
    assert "\n" not in str(error.value)


def _set(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("colour", value=1), r"the timeline has the unknown field\(s\) colour"),
        (_set("seconds", value=float("inf")), "seconds of the timeline must be a finite number, at least 0, got inf"),
        (_set("seconds", value=10**400), "seconds of the timeline must be a finite number"),
        (_set("seconds", value=-1), "seconds of the timeline must be a finite number"),
        (_set("capacity", value="20GiB"), "capacity of the timeline must be a whole number, at least 0, got '20GiB'"),
        (_set("predicted", value="soon"), "predicted of the timeline must be a finite number, at least 0, got 'soon'"),
        (_set("rank", value=True), "rank of the timeline must be a whole number"),
        (_set("kind", value=None), "kind of the timeline must be a text, got None"),
        (_set("chunks", value={}), "chunks of the timeline must be a list"),
        (_set("chunks", 2, value=7), "chunk 2 must be a JSON object, got 7"),
        (_set("chunks", 2, "nbytes", value=-5), "nbytes of chunk 2 must be a whole number, at least 0, got -5"),
        (_set("chunks", 2, "index", value=1), "chunk 2 of the timeline says that it is chunk 1"),
        (_set("moments", 1, "backward", value=0), "backward of moment 1 must be true or false, got 0"),
        (_set("moments", 1, "pinned", value=[0, "1"]), "pinned of moment 1 must be a list of whole numbers"),
        (_set("moments", 1, "pinned", value=[-1]), "pinned of moment 1 must be a list of whole numbers, at least 0"),
        (_set("moments", 1, "coming", value=[4]), "moment 1 names chunk 4, but the timeline has 4 chunks"),
        (_set("moments", 3, "reason", value=["x" * 999]), r"reason of moment 3 must be a text, got \['x{58}\.\.\.\."),
    ],
)
def test_what_cannot_be_right_is_refused(change: Callable[[Any], None], message: str) -> None:
    data = json.loads(small().to_json())
    change(data)
    with pytest.raises(ConfigurationError, match=message):
        Timeline.from_json(json.dumps(data))


def test_a_field_that_is_missing_deep_inside_is_named() -> None:
    data = json.loads(small().to_json())
    del data["moments"][2]["waited"]
    with pytest.raises(ConfigurationError, match=r"moment 2 lacks the field\(s\) waited"):
        Timeline.from_json(json.dumps(data))


def test_a_moment_without_unsharded_chunks_can_be_read() -> None:
    timeline = small()
    idle = replace(timeline.moments[0], resident=(), pinned=(), coming=(), unsharded=0)
    timeline = replace(timeline, moments=(idle,))
    assert Timeline.from_json(timeline.to_json()) == timeline
