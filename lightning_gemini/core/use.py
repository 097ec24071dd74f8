"""Who uses which chunks, and until when: events of units -> pins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import Node

from lightning_gemini.core.chunk import Chunk
from lightning_gemini.core.errors import StateError
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.store import Store
from lightning_gemini.core.units import Unit

Use = tuple[Chunk, ...]


@dataclass
class _Frame:
    """A forward that is running: of a unit, or the scope around a whole step."""

    name: str
    own: Use
    borrowed: list[Chunk] = field(default_factory=list)


class Uses:
    """Pins chunks for units in forward and backward, and for the reads that come outside of them.

    A chunk that a unit reads though it is not its own (a parent that uses its child's weight) is *borrowed*: pinned
    until that forward ends, and again in the unit's backward. A chunk that autograd unpacks for a node of no open unit
    is pinned until that node has run.
    """

    def __init__(self, store: Store, schedule: Schedule, units: Sequence[Unit]) -> None:
        self._schedule = schedule
        self._chunk_of = [store.chunks[store.layout.place(index)[0]] for index in range(len(store.layout.params))]
        self._own: dict[Unit, Use] = {
            unit: tuple({self._chunk_of[index].index: self._chunk_of[index] for index in unit.params}.values())
            for unit in units
        }
        self._frames: list[_Frame] = []
        self._node_pins: list[tuple[int, Node | None, Chunk]] = []
        self._backward_pins: list[Chunk] = []

    @property
    def running(self) -> bool:
        """Whether a forward is under way."""
        return bool(self._frames)

    def enter_scope(self, name: str) -> None:
        """Opens a frame that is no unit's: reads before its end stay pinned until then."""
        self._frames.append(_Frame(name, ()))

    def exit_scope(self) -> None:
        """Closes the innermost frame."""
        frame = self._frames.pop()
        for chunk in (*frame.own, *frame.borrowed):
            self._schedule.release(chunk)

    def pre_forward(self, unit: Unit) -> None:
        """The unit's parameters become usable."""
        own = self._own[unit]
        self._acquire(own, unit.name)
        unit.active += 1
        self._frames.append(_Frame(unit.name, own))

    def post_forward(self, unit: Unit) -> Use:
        """The unit's forward is over; returns what its backward will need."""
        unit.active -= 1
        frame = self._frames[-1]
        self.exit_scope()
        return (*frame.own, *frame.borrowed)

    def pre_backward(self, unit: Unit, use: Use) -> None:
        """The gradient of the unit's output is there."""
        self._release_finished_nodes()
        self._acquire(use, f"the backward of {unit.name}")

    def post_backward(self, use: Use) -> None:
        """Nothing of the unit's backward is left to run."""
        for chunk in use:
            self._schedule.release(chunk)

    def read(self, param: int, name: str) -> None:
        """A parameter is read by no forward of its own unit; outside of any step nothing happens."""
        chunk = self._chunk_of[param]
        if self._frames:
            frame = self._frames[-1]
            if chunk not in frame.own and chunk not in frame.borrowed:
                self._schedule.acquire(chunk, f"a read of {name} in {frame.name}")
                frame.borrowed.append(chunk)
        elif torch._C._current_graph_task_id() != -1 and chunk not in self._backward_pins:
            # in a backward, by a custom function or a recomputed forward without a unit: nothing says when it ends
            self._schedule.acquire(chunk, f"a read of {name} in a backward")
            self._backward_pins.append(chunk)

    def borrow(self, param: int, name: str) -> Chunk | None:
        """Pins the chunk of a parameter for one operation; ``None`` if it is in use already."""
        chunk = self._chunk_of[param]
        if chunk.pins:
            return None
        self._schedule.acquire(chunk, f"a read of {name} that no hook announced")
        return chunk

    def give_back(self, chunk: Chunk, keep: bool) -> None:
        """Ends :meth:`borrow`, or with ``keep`` leaves the chunk pinned until the forward under way is over."""
        if keep and self._frames:
            self._frames[-1].borrowed.append(chunk)
        elif keep and torch._C._current_graph_task_id() != -1:
            self._backward_pins.append(chunk)
        else:
            self._schedule.release(chunk)

    def hand_up(self, chunk: Chunk, name: str) -> None:
        """A forward that has just ended returns a view of ``chunk``: it stays until the one around it ends, too."""
        if self._frames and chunk not in self._frames[-1].own and chunk not in self._frames[-1].borrowed:
            self._schedule.acquire(chunk, f"what {name} returned of it")
            self._frames[-1].borrowed.append(chunk)

    def unpack(self, chunk: Chunk) -> None:
        """Autograd needs a tensor that it saved from ``chunk``."""
        self._release_finished_nodes()
        if chunk.pins == 0:
            self._schedule.acquire(chunk, "a tensor that autograd saved")
            node = torch._C._current_autograd_node()
            self._node_pins.append((torch._C._current_graph_task_id(), node, chunk))

    def backward_over(self) -> None:
        """The outermost backward is over."""
        for _, _, chunk in self._node_pins:
            self._schedule.release(chunk)
        for chunk in self._backward_pins:
            self._schedule.release(chunk)
        self._node_pins.clear()
        self._backward_pins.clear()
        self._schedule.backward_over()

    def reset(self) -> None:
        """Forgets everything, after a failure; the schedule's own reset drops the pins."""
        for unit in self._own:
            unit.active = 0
        self._frames.clear()
        self._node_pins.clear()
        self._backward_pins.clear()

    def check_idle(self) -> None:
        """Raises StateError while a forward runs: chunks must not change under it."""
        if self._frames and any(frame.own for frame in self._frames):
            raise StateError(f"the weights cannot be changed inside the forward of {self._frames[-1].name}")

    def _acquire(self, chunks: Use, reason: str) -> None:
        done = 0
        try:
            for chunk in chunks:
                self._schedule.acquire(chunk, reason)
                done += 1
        except BaseException:
            for chunk in chunks[:done]:
                self._schedule.release(chunk)
            raise

    def _release_finished_nodes(self) -> None:
        if not self._node_pins:
            return
        task, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
        running = [(t, n, c) for t, n, c in self._node_pins if t != task or n is node]
        for pin in self._node_pins:
            if pin not in running:
                self._schedule.release(pin[2])
        self._node_pins = running
