"""Runs the user's optimizer over the chunks.

NOTE: one step, many chunks.
The optimizer keeps the model's own parameters in its groups, so that schedulers, ``toggle_optimizer`` and the user find
what they expect. Only during ``step()`` are they exchanged for the flat segments of one chunk at a time. For all chunks
but the last the rule is called directly, with the groups' settings put back afterwards; the last one is left to the
call that the user made. So counters in a group advance once, and hooks and schedulers see one step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.collectives import Pending
from lightning_gemini.core.elementwise import unhooked_step
from lightning_gemini.core.errors import StateError
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.segments import Segment, SegmentedShard
from lightning_gemini.core.store import Store
from lightning_gemini.optim.masters import round_to_compute


class ChunkUpdate:
    """One chunk as its optimizer sees it: the master, or the shard itself, in segments."""

    def __init__(self, store: Store, gradient: ChunkGradient) -> None:
        chunk = gradient.chunk
        self.chunk = chunk
        self.gradient = gradient
        self.spans = gradient.spans
        self._store = store
        self._tier = store.tier_of(chunk)
        self._state_bytes = 0

    @cached_property
    def target(self) -> Tensor:
        """The master or the shard; found when it is first needed, which for a frozen chunk may be late or never."""
        return self._store.update_target(self.chunk)

    @cached_property
    def shard(self) -> SegmentedShard:
        """The target as the optimizer sees it."""
        return SegmentedShard(self.target, self.spans)

    @property
    def is_new(self) -> bool:
        """Whether there has been neither an update nor any state of the optimizer."""
        return "shard" not in self.__dict__

    def begin(self, optimizer: Optimizer) -> list[Segment]:
        """Hands the gradients and the state of what is to be updated to the optimizer."""
        segments = self.shard.select(self.gradient.used)
        grad = self.gradient.shard
        if grad is None:
            return []
        for segment in segments:
            segment.flat.grad = grad[segment.start : segment.stop].to(segment.flat.dtype)
            if segment.state:
                optimizer.state[segment.flat] = segment.state
        return segments

    def end(self, optimizer: Optimizer, segments: Sequence[Segment]) -> None:
        """Takes the state back and brings what has changed into the shard."""
        fresh = any(not segment.state for segment in segments)
        for segment in segments:
            segment.flat.grad = None
            segment.state = optimizer.state.pop(segment.flat, {})
            if self.chunk.index in self._store.masters:
                part = self.chunk.shard[segment.start : segment.stop]
                round_to_compute(segment.flat.detach(), part)
        if fresh:
            self.count_state()

    def count_state(self) -> None:
        """Counts the optimizer's state on the tier where it lives, after it has been made or replaced."""
        states = [value for segment in self.shard.segments for value in segment.state.values()]
        nbytes = sum(value.nbytes for value in states if isinstance(value, Tensor))
        self._tier.give(self._state_bytes)
        self._state_bytes = 0
        self._tier.take(nbytes, f"the optimizer state of chunk {self.chunk.index}")
        self._state_bytes = nbytes


class OptimizerOnChunks:
    """Makes ``optimizer.step()`` and ``optimizer.zero_grad()`` work on chunks.

    Args:
        optimizer: the user's; it is hooked, not replaced.
        updates: its chunks, in the order in which the forward needs them.
        notice: called first in every step and ``zero_grad``, to find out about a backward that failed.
        prepare: called before anything is updated; agrees with the other ranks, may raise.
        updated: called when parameters of a chunk have changed, with the marks of those that have.
        dropped: called when parameters have lost their gradients.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        updates: Sequence[ChunkUpdate],
        store: Store,
        schedule: Schedule,
        gradients: Gradients,
        notice: Callable[[], None],
        prepare: Callable[[list[ChunkGradient]], None],
        updated: Callable[[Chunk, list[bool]], None],
        dropped: Callable[[Iterable[nn.Parameter]], None],
    ) -> None:
        self.optimizer = optimizer
        self.updates = list(updates)
        self._store = store
        self._schedule = schedule
        self._gradients = gradients
        self._notice = notice
        self._prepare = prepare
        self._updated = updated
        self._dropped = dropped
        self._params: list[list[nn.Parameter]] = []
        self._last: tuple[ChunkUpdate, list[Segment]] | None = None
        self._stepping = False
        self._call: FrameType | None = None  # the call of ``step`` under way
        self._refreshing: list[Pending] = []
        self._n_groups = len(optimizer.param_groups)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        optimizer.zero_grad = self.zero_grad  # type: ignore[method-assign]

    @property
    def gradients(self) -> list[ChunkGradient]:
        return [update.gradient for update in self.updates]

    @property
    def stepping(self) -> bool:
        """Whether a step is under way, or ended in an exception: some chunks may have been updated and others not."""
        return self._stepping

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of this optimizer's parameters."""
        self._notice()
        self._gradients.discard(self.gradients)
        self._dropped(param for gradient in self.gradients for param in gradient.chunk.params)

    def remove(self) -> None:
        """Makes the optimizer an ordinary one again, without state."""
        self.restore()
        for update in self.updates:
            if not update.is_new:
                update.shard.segments.clear()
                update.count_state()
        for handle in self._handles:
            handle.remove()
        self.optimizer.__dict__.pop("zero_grad", None)

    def restore(self) -> None:
        """Puts the model's parameters back into the groups, after a step that ended in an exception too."""
        for group, params in zip(self.optimizer.param_groups, self._params, strict=False):
            group["params"] = params
        self._params = []
        self._last = None
        self._call = None
        self._refreshing.clear()

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_inside(self._call):
            return args, kwargs  # a subclass's step calls super().step(), which torch hooks as well
        self.restore()  # if the last call failed half-way
        self._notice()
        args, kwargs = self._run_closure(args, kwargs)
        if len(self.optimizer.param_groups) != self._n_groups:
            raise StateError(
                f"the optimizer had {self._n_groups} parameter groups when the chunks were laid out and has "
                f"{len(self.optimizer.param_groups)} now. Add all groups in configure_optimizers."
            )
        self._prepare(self.gradients)
        self._call = sys._getframe(1)
        self._stepping = True
        self._params = [group["params"] for group in self.optimizer.param_groups]
        try:
            active = [u for u in self.updates if u.gradient.shard is not None and any(u.gradient.used)]
            for update in active[:-1]:
                settings = [dict(group) for group in self.optimizer.param_groups]
                segments = self._offer(update)
                if segments:
                    unhooked_step(self.optimizer)(self.optimizer)
                for group, before in zip(self.optimizer.param_groups, settings, strict=True):
                    group.clear()
                    group.update(before)
                self._finish(update, segments)
            if active:
                self._last = (active[-1], self._offer(active[-1]))
            else:
                self._offer(None)
        except BaseException:
            self.restore()
            raise
        return args, kwargs

    def _after_step(self, *_: Any) -> None:
        if sys._getframe(1) is not self._call:
            return
        if self._last is not None:
            self._finish(*self._last)
        for pending in self._refreshing:
            pending.wait()
        self._stepping = False
        self.restore()
        self._gradients.discard(self.gradients)

    def _run_closure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Calls the closure now, so that its gradients are there, and leaves its result in its place."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return args, kwargs
        with torch.enable_grad():
            loss = closure()
        if len(args) > 1:
            return (args[0], lambda: loss, *args[2:]), kwargs
        return args, {**kwargs, "closure": lambda: loss}

    def _offer(self, update: ChunkUpdate | None) -> list[Segment]:
        segments = update.begin(self.optimizer) if update is not None else []
        for index, group in enumerate(self.optimizer.param_groups):
            mine = update is not None and update.chunk.spec.kind.group == index
            group["params"] = [segment.flat for segment in segments] if mine else []
        return segments

    def _finish(self, update: ChunkUpdate, segments: list[Segment]) -> None:
        update.end(self.optimizer, segments)
        chunk = update.chunk
        self._updated(chunk, update.gradient.used)
        self._store.counters.updates += 1
        if chunk.home is Home.FULL:
            self._refreshing.append(self._store.refresh(chunk))
        else:
            self._schedule.renew(chunk)


def _is_inside(call: FrameType | None) -> bool:
    """Whether ``call`` is still running, further up in the stack."""
    frame: FrameType | None = sys._getframe(1) if call is not None else None
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None
