"""One training step as data: which chunk is where at each moment, and what was copied and waited for.

A moment begins when a unit needs a chunk. A timeline is a pure value with a form in JSON; nothing here looks at an
engine or at a device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, TypeVar

from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.worker import hidden_share

#: The form of the JSON; it grows whenever a reader of the older form would read something wrong, or refuse it.
FORMAT = 2

#: Rank 0's file; the other ranks' names are those of :func:`file_name`.
FILE_NAME = "gemini_step.json"


_Record = TypeVar("_Record", "Timeline", "TimelineChunk", "TimelineMoment")


def file_name(rank: int) -> str:
    """The name of the file with the timeline of rank ``rank``."""
    return FILE_NAME if rank == 0 else FILE_NAME.replace(".", f"-rank{rank}.")


class Place(Enum):
    """Where a chunk is at a moment; the larger the value, the closer to being used."""

    HOST = 0  #: in host memory only
    DEVICE = 1  #: at its home on the device, not usable: sharded
    UPDATING = 2  #: in host memory, where the update of the last step is not over
    COMING = 3  #: a copy from the host or a gather is under way
    RESIDENT = 4  #: unsharded and idle
    IN_USE = 5  #: unsharded and pinned by a unit or by autograd


@dataclass(frozen=True)
class TimelineChunk:
    """What a timeline has to know of one chunk.

    Attributes:
        index: its position in :attr:`Timeline.chunks`.
        nbytes: bytes of the unsharded chunk.
        on_device: whether its home is on the device.
        first: the name of its first parameter.
        trained: whether an optimizer updates it.
        kept: whether the unsharded chunk is its home, so that it is never freed; its bytes are among the homes then.
    """

    index: int
    nbytes: int
    on_device: bool
    first: str
    trained: bool
    kept: bool = False


@dataclass(frozen=True)
class TimelineMoment:
    """A unit has its chunk, and this is where all chunks are.

    Attributes:
        reason: the unit's name.
        backward: whether a backward is under way, which includes what is computed again in it.
        chunk: the chunk that the unit needed.
        seconds: since the step began.
        waited: seconds that the unit waited for its chunk.
        resident: indices of the unsharded chunks; those that are kept may be left out.
        pinned: indices of the chunks in use.
        coming: indices of the chunks whose copy or gather is under way.
        updating: indices of the chunks whose update in host memory is not over; they may be coming, too.
        homes: bytes of homes on the device.
        unsharded: bytes of unsharded chunks beside the homes, those that are coming included.
        other: further bytes on the device, such as gradient buffers and activations.
        fetched: bytes whose copy from the host began in this moment.
        offloaded: bytes whose copy to the host began in this moment.
    """

    reason: str
    backward: bool
    chunk: int
    seconds: float
    waited: float
    resident: tuple[int, ...]
    pinned: tuple[int, ...]
    coming: tuple[int, ...]
    updating: tuple[int, ...]
    homes: int
    unsharded: int
    other: int
    fetched: int
    offloaded: int


@dataclass(frozen=True)
class DeviceBytes:
    """Device memory at a moment, by what it is used for, in bytes."""

    homes: int
    in_use: int
    idle: int
    coming: int
    other: int

    @property
    def total(self) -> int:
        return self.homes + self.in_use + self.idle + self.coming + self.other


@dataclass(frozen=True)
class Timeline:
    """One step of one rank.

    Attributes:
        kind: what this was, in a few words for a title.
        rank: the rank that was followed.
        world_size: ranks that share the chunks.
        capacity: bytes that chunks may take on the device, ``None`` without a bound.
        chunks: all chunks, in the order of their indices.
        moments: in the order in which they came; none where no chunk moves.
        seconds: of the whole step.
        report: the memory report, as text.
        update_seconds: of the updates in host memory that began with the step before this one.
        update_waited: seconds that anybody waited for them.
        predicted: seconds that the plan expects from the step's beginning to that of the next one, the update between
            them included; ``None`` if nothing is expected.
    """

    kind: str
    rank: int
    world_size: int
    capacity: int | None
    chunks: tuple[TimelineChunk, ...]
    moments: tuple[TimelineMoment, ...]
    seconds: float
    report: str
    update_seconds: float
    update_waited: float
    predicted: float | None = None

    @property
    def update_hidden_share(self) -> float | None:
        """How much of the updates nobody waited for, from 0 to 1; ``None`` if there were none."""
        return hidden_share(self.update_seconds, self.update_waited)

    def places(self, moment: int) -> list[Place]:
        """Where each chunk is at moment number ``moment``."""
        now = self.moments[moment]
        places = [_place_between_uses(chunk) for chunk in self.chunks]
        groups = {
            Place.RESIDENT: now.resident,
            Place.COMING: now.coming,
            Place.UPDATING: now.updating,
            Place.IN_USE: now.pinned,
        }
        for place, indices in groups.items():
            for index in indices:
                places[index] = place
        return places

    def place(self, chunk: int, moment: int) -> Place:
        """Where chunk number ``chunk`` is at moment number ``moment``."""
        return self.places(moment)[chunk]

    def device_bytes(self, moment: int) -> DeviceBytes:
        """What device memory is used for at moment number ``moment``; kept chunks count as homes, in use or not."""
        now = self.moments[moment]
        in_use = min(self._moving_bytes(set(now.pinned)), now.unsharded)
        coming = min(self._moving_bytes(set(now.coming) - set(now.pinned)), now.unsharded - in_use)
        return DeviceBytes(now.homes, in_use, now.unsharded - in_use - coming, coming, now.other)

    def _moving_bytes(self, indices: set[int]) -> int:
        return sum(self.chunks[index].nbytes for index in indices if not self.chunks[index].kept)

    def to_json(self) -> str:
        """This timeline as one JSON object, with the field ``format``."""
        chunks, moments = [vars(chunk) for chunk in self.chunks], [vars(moment) for moment in self.moments]
        data = {"format": FORMAT, **vars(self), "chunks": chunks, "moments": moments}
        return json.dumps(data, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """The timeline that :meth:`to_json` wrote.

        Raises:
            ConfigurationError: ``text`` is no JSON object, is of another format, lacks a field or has one too many,
                or has a value that cannot be right.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"expected the timeline of a step as JSON, but it does not parse: {error}"
            ) from None
        if not isinstance(data, dict) or "format" not in data:
            raise ConfigurationError("expected the timeline of a step: a JSON object with the field 'format'.")
        if data["format"] != FORMAT:
            raise ConfigurationError(
                f"expected the timeline of a step in format {FORMAT}, got format {data['format']!r}. Read it with the "
                "version of lightning_gemini that wrote it, or follow a step again with this one."
            )
        timeline = _record(cls, {key: value for key, value in data.items() if key != "format"}, "the timeline")
        _check_indices(timeline)
        return timeline


def _place_between_uses(chunk: TimelineChunk) -> Place:
    if chunk.kept:
        return Place.RESIDENT
    return Place.DEVICE if chunk.on_device else Place.HOST


def _check_indices(timeline: Timeline) -> None:
    count = len(timeline.chunks)
    for position, chunk in enumerate(timeline.chunks):
        if chunk.index != position:
            raise ConfigurationError(f"chunk {position} of the timeline says that it is chunk {chunk.index}.")
    for position, moment in enumerate(timeline.moments):
        highest = max((moment.chunk, *moment.resident, *moment.pinned, *moment.coming, *moment.updating))
        if highest >= count:
            raise ConfigurationError(f"moment {position} names chunk {highest}, but the timeline has {count} chunks.")


def _record(cls: type[_Record], data: Any, where: str) -> _Record:
    """A dataclass of this file, of what JSON made of it; ``where`` is what errors call it."""
    if not isinstance(data, dict):
        raise ConfigurationError(f"{where} must be a JSON object, got {_short(data)}.")
    types = {field.name: str(field.type) for field in fields(cls)}
    if missing := [name for name in types if name not in data]:
        raise ConfigurationError(f"{where} lacks the field(s) {', '.join(missing)}.")
    if unknown := [name for name in data if name not in types]:
        raise ConfigurationError(f"{where} has the unknown field(s) {', '.join(unknown)}.")
    values = {}
    for name, kind in types.items():
        try:
            values[name] = _READERS[kind](data[name])
        except TypeError as error:
            raise ConfigurationError(f"{name} of {where} must be {error}, got {_short(data[name])}.") from None
    return cls(**values)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("a whole number, at least 0")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
        raise TypeError("a finite number, at least 0")
    return float(value)


def _of(kind: type, name: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(name)
        return value

    return read


def _whole_list(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        raise TypeError("a list of whole numbers, at least 0")
    return tuple(value)


def _list_of(cls: type[_Record], name: str) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError("a list")
        return tuple(_record(cls, item, f"{name} {position}") for position, item in enumerate(value))

    return read


#: How to read a field, by its annotation; ``TypeError`` carries what was expected.
_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _whole,
    "int | None": lambda value: None if value is None else _whole(value),
    "float": _number,
    "float | None": lambda value: None if value is None else _number(value),
    "bool": _of(bool, "true or false"),
    "str": _of(str, "a text"),
    "tuple[int, ...]": _whole_list,
    "tuple[TimelineChunk, ...]": _list_of(TimelineChunk, "chunk"),
    "tuple[TimelineMoment, ...]": _list_of(TimelineMoment, "moment"),
}


def _short(value: Any) -> str:
    """``value`` in an error message, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
