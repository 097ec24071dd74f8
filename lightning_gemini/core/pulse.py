"""What one rank is doing, as it goes: written by whoever makes progress, read by a watchdog in another thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pulse:
    """Progress of one rank.

    Attributes:
        beats: grows with every bit of progress. Whoever makes some adds one: a plain write, without clock or lock.
        unit: what needed a chunk last.
        collectives: how many this rank has begun.
        collective: the last one of them, in words.
        sections: what is worth knowing of a rank that is stuck, by title. They are called from another thread, so they
            must not wait for the device, for a lock or for other ranks.
    """

    def __init__(self) -> None:
        self.beats = 0
        self.unit = ""
        self.collectives = 0
        self.collective = ""
        self.sections: dict[str, Callable[[], str]] = {}
        # by the identity of each block, so that threads and blocks that end out of order do not confuse them
        self._steps: dict[object, str] = {}
        self._waits: dict[object, str] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Around what counts as inside a step or an evaluation."""
        block = object()
        self.beats += 1
        self._steps[block] = name
        try:
            yield
        finally:
            self._steps.pop(block, None)
            self.beats += 1

    def abandon(self) -> None:
        """The steps under way have failed; their blocks may never end."""
        self._steps.clear()

    def begin(self, collective: str) -> None:
        """This rank begins a collective."""
        self.beats += 1
        self.collectives += 1
        self.collective = collective

    def enter(self, what: str) -> object:
        """A wait for other ranks begins; what is returned ends it."""
        block = object()
        self.beats += 1
        self._waits[block] = what
        return block

    def leave(self, block: object) -> None:
        """A wait is over."""
        self._waits.pop(block, None)
        self.beats += 1

    @property
    def busy(self) -> bool:
        """Whether this rank is inside a step or waits for others; if not, it may take as long as it likes."""
        return bool(self._steps or self._waits)

    def where(self) -> str:
        """What this rank is doing, in words that go after "is"; what it waits for comes first."""
        last = f"collective {self.collectives}, {self.collective}" if self.collectives else "none"
        step, wait = _latest(self._steps), _latest(self._waits)
        if wait is not None:
            return f"in {wait} (its collective {self.collectives})" + (f", inside {step}" if step else "")
        if step is not None:
            unit = f"; the last unit that needed a chunk: {self.unit}" if self.unit else ""
            return f"inside {step}, waiting for no other rank{unit}; the last collective: {last}"
        return (
            "in code between steps (data loading, a callback, a breakpoint), waiting for no other rank; the last "
            f"collective: {last}"
        )


def _latest(blocks: dict[object, str]) -> str | None:
    return next(reversed(list(blocks.values())), None)
