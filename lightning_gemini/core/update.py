"""Runs the user's optimizer over the chunks.

NOTE: one step, many chunks.
The optimizer keeps the model's own parameters in its groups, so that schedulers, ``toggle_optimizer`` and the user find
what they expect. A torch optimizer whose arithmetic is among the rules (``optim/``) is not called for its chunks at
all: its groups' settings are read and the rule makes one pass over each shard. Any other runs as it is: during
``step()`` its parameters are exchanged for the flat segments of one chunk at a time; for all chunks but the last it is
called directly, with the groups' settings put back afterwards, and the last one is left to the call that the user made.
Either way that call really happens, so counters in a group advance once, and hooks and schedulers see one step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.chunk_update import ChunkUpdate
from lightning_gemini.core.collectives import Pending
from lightning_gemini.core.errors import StateError
from lightning_gemini.core.footprint import EARLY_AT_ONCE
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.store import Store
from lightning_gemini.core.trial import unhooked_step
from lightning_gemini.optim.rule import Rule


class OptimizerOnChunks:
    """Makes ``optimizer.step()`` and ``optimizer.zero_grad()`` work on chunks.

    Args:
        optimizer: the user's; it is hooked, not replaced.
        updates: its chunks, in the order in which the forward needs them.
        notice: called first in every step and ``zero_grad``, to find out about a backward that failed.
        may_update: called before anything is updated; agrees with the other ranks, may raise, says whether to go on.
        updated: called when parameters of a chunk have changed, with the marks of those that have.
        dropped: called when parameters have lost their gradients.
        over: called last in every step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        updates: Sequence[ChunkUpdate],
        store: Store,
        schedule: Schedule,
        gradients: Gradients,
        notice: Callable[[], None],
        may_update: Callable[[list[ChunkGradient]], bool],
        updated: Callable[[Chunk, list[bool]], None],
        dropped: Callable[[Iterable[nn.Parameter]], None],
        over: Callable[[], None],
    ) -> None:
        self.optimizer = optimizer
        self.updates = list(updates)
        self._store = store
        self._schedule = schedule
        self._gradients = gradients
        self._notice = notice
        self._may_update = may_update
        self._updated = updated
        self._dropped = dropped
        self._over = over
        self._params: list[list[nn.Parameter]] = []
        self._last: ChunkUpdate | None = None  # left to the user's call
        self._stepping = False
        self._call: FrameType | None = None  # the call of ``step`` under way
        self._unchanged: list[dict[str, Any]] | None = None  # the groups, if the step under way is skipped
        self._refreshing: list[Pending] = []
        self._done_early: set[ChunkUpdate] = set()  # before their step
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
        return self._stepping or self._store.host_updates.failed

    @property
    def early(self) -> bool:
        """Whether chunks have been updated before their step."""
        return bool(self._done_early)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of this optimizer's parameters.

        Raises:
            StateError: some have been used already, within their backward.
        """
        self._notice()
        if self._done_early:
            names = ", ".join(sorted(update.chunk.names[0] for update in self._done_early)[:3])
            raise StateError(
                f"zero_grad() would drop gradients of {names} and possibly others, but with update='in_backward' they "
                "were used in the backward that they came in. If it was another optimizer's, keep these parameters "
                "out of it with self.toggle_optimizer(...) or requires_grad_(False), or use update='at_step'."
            )
        self._gradients.discard(self.gradients)
        self._dropped(param for gradient in self.gradients for param in gradient.chunk.params)

    def update_now(self, update: ChunkUpdate) -> None:
        """Updates one chunk within a backward; the step that follows finds nothing left to do for it.

        Raises:
            StateError: it has been updated since the last step.
        """
        if update in self._done_early:
            raise StateError(
                f"the gradient of {update.chunk.names[0]} came twice before optimizer.step(), but with "
                "update='in_backward' its first part has been used and is gone. Call step() after each backward, keep "
                "parameters out of another optimizer's backward with self.toggle_optimizer(...), and use "
                "update='at_step' to accumulate, or for a module that several reentrant checkpoints share."
            )
        if update.active:
            self._done_early.add(update)
            self._exchange_params()
            try:
                self._update([update], in_backward=True)
                self._wait()
                self._stepping = False
            finally:
                self.restore()

    def remove(self) -> None:
        """Makes the optimizer an ordinary one again, without state."""
        self.restore()
        for update in self.updates:
            update.forget_state()
        for handle in self._handles:
            handle.remove()
        self.optimizer.__dict__.pop("zero_grad", None)

    def abort(self) -> None:
        """Forgets the step or the backward under way."""
        self.restore()
        self._done_early.clear()

    def restore(self) -> None:
        """Puts the model's parameters back into the groups, after a step that ended in an exception too."""
        for group, params in zip(self.optimizer.param_groups, self._params, strict=False):
            group["params"] = params
        for update in self.updates:
            update.withdraw()
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
        may_update = self._may_update(self.gradients)
        self._unchanged = None if may_update else [dict(group) for group in self.optimizer.param_groups]
        self._call = sys._getframe(1)
        self._exchange_params()
        try:
            self._update([u for u in self.updates if u.active] if may_update else [], args, kwargs)
        except BaseException:
            self.restore()
            raise
        return args, kwargs

    def _after_step(self, *_: Any) -> None:
        if sys._getframe(1) is not self._call:
            return
        if self._last is not None:
            self._last.take_back()
            self._finish(self._last)
        self._wait()
        self._stepping = False
        self._done_early.clear()
        self.restore()
        if self._unchanged is not None:
            self._set_groups(self._unchanged)
        self._gradients.discard(self.gradients)
        self._over()

    def _exchange_params(self) -> None:
        self._params = [group["params"] for group in self.optimizer.param_groups]
        self._offer(None)

    def _update(
        self,
        updates: Sequence[ChunkUpdate],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        in_backward: bool = False,
    ) -> None:
        """Updates ``updates``, but for one that is left to the user's call of ``step`` if there is one to come.

        Args:
            args, kwargs: of that call.
        """
        rules = {update: rule for update in updates if (rule := update.rule) is not None}
        by_group = {update.chunk.spec.kind.group or 0: rule for update, rule in rules.items()}
        for index, rule in by_group.items():
            rule.scalars(self.optimizer.param_groups[index], {})  # a setting that is no number is found now
        for update, rule in rules.items():
            update.prepare(rule)
        others = [update for update in updates if update not in rules]
        self._last = others[-1] if others and not in_backward else None
        self._stepping = bool(updates)
        if in_backward:
            self._store.host_updates.keep(EARLY_AT_ONCE - 1)
        started = self._start_on_host(rules)
        for update in updates:
            if update is self._last:
                continue
            if update in started:
                pass
            elif update in rules:
                update.job(rules[update])()
            else:
                self._run(update, args, kwargs)
            self._finish(update, in_backward)
        self._offer(self._last)

    def _start_on_host(self, rules: Mapping[ChunkUpdate, Rule]) -> set[ChunkUpdate]:
        """Starts the updates that run in the background, in the order in which the next step needs their chunks."""
        updates = {update for update in rules if self._store.host_updates.takes(update.chunk)}
        copied = self._store.fetching.mark()  # a copy of a chunk that was dropped may still read its shard
        for update in sorted(updates, key=lambda update: self._schedule.need_of(update.chunk)):
            job = update.job(rules[update])
            self._store.host_updates.start(update.chunk, job, update.gradient.hand_over(), copied)
        return updates

    def _run(self, update: ChunkUpdate, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Calls the optimizer for one chunk, and puts its groups' settings back."""
        settings = [dict(group) for group in self.optimizer.param_groups]
        self._offer(update)
        unhooked_step(self.optimizer)(self.optimizer, *args[1:], **kwargs)
        self._set_groups(settings)
        update.take_back()

    def _set_groups(self, settings: Sequence[Mapping[str, Any]]) -> None:
        for group, before in zip(self.optimizer.param_groups, settings, strict=True):
            group.clear()
            group.update(before)

    def _offer(self, update: ChunkUpdate | None) -> None:
        params = update.offer() if update is not None else []
        for index, group in enumerate(self.optimizer.param_groups):
            mine = update is not None and update.chunk.spec.kind.group == index
            group["params"] = params if mine else []

    def _finish(self, update: ChunkUpdate, in_backward: bool = False) -> None:
        chunk = update.chunk
        self._updated(chunk, update.gradient.used)
        self._store.counters.updates += 1
        if chunk.home is Home.FULL:
            self._refreshing.append(self._store.refresh(chunk))
        else:
            self._schedule.renew(chunk, refill=not in_backward)

    def _wait(self) -> None:
        for pending in self._refreshing:
            pending.wait()
        self._refreshing.clear()

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


def _is_inside(call: FrameType | None) -> bool:
    """Whether ``call`` is still running, further up in the stack."""
    frame: FrameType | None = sys._getframe(1) if call is not None else None
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None
