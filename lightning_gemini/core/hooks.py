"""Module and autograd hooks -> events; knows no chunk.

NOTE: the end of a unit's backward.
It is over when all its trainable gradients are in *and* the gradient of every differentiable input is: gradients alone
come too early for a trainable bias beside a frozen weight. A unit without a differentiable input stays open until the
outermost backward ends. ``register_full_backward_hook`` would not do: without such an input it fires first.

NOTE: the outermost backward.
Reentrant checkpointing runs backwards inside a backward, and autograd's callbacks are per graph task. The tasks seen
are counted; when the last of them is over, so is the backward. Who knows better says so with :meth:`Hooks.backward`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gemini.core.inert import Attached
from lightning_gemini.core.units import Unit


class Events(Protocol):
    """What the hooks report to.

    ``use`` is whatever ``post_forward`` returned for that call; ``declared`` tells whether the backward that is over
    was announced with :meth:`Hooks.backward`.
    """

    def pre_forward(self, unit: Unit) -> None: ...
    def post_forward(self, unit: Unit, output: Any) -> Any: ...
    def pre_backward(self, unit: Unit, use: Any) -> None: ...
    def post_backward(self, use: Any) -> None: ...
    def gradient(self, param: int, grad: Tensor) -> None: ...
    def backward_over(self, declared: bool) -> None: ...
    def backward_failed(self) -> None: ...


class Hooks:
    """The hooks on one model.

    Args:
        events: what they report to.
        units: the modules to watch; empty if only gradients matter.
        params: the parameters whose gradients matter, now or when they are unfrozen, by index.
    """

    def __init__(self, events: Events, units: Sequence[Unit], params: Mapping[int, nn.Parameter]) -> None:
        self._events = events
        self._params = params
        self._forwards: list[_Call] = []
        self._tasks: list[int] = []
        self._explicit = 0
        self._open: dict[_Call, None] = {}
        self._waiting_for: dict[int, list[_Call]] = {}
        self._handles: list[RemovableHandle] = []
        for unit in units:
            # first in, last out: the users' own hooks see usable parameters
            before, after = Attached(partial(self._pre_forward, unit)), Attached(partial(self._post_forward, unit))
            if unit.compiled:  # Dynamo would trace them
                before, after = torch.compiler.disable(before), torch.compiler.disable(after)
            # a ScriptModule refuses its own methods
            register_pre, register = nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook
            self._handles += [
                register_pre(unit.module, before, prepend=True, with_kwargs=True),
                register(unit.module, after, with_kwargs=True, always_call=True),
            ]
        for index, param in params.items():
            trainable = param.requires_grad
            param.requires_grad_(True)  # torch wants that, though the hook stays when it changes
            self._handles.append(param.register_post_accumulate_grad_hook(partial(self._gradient, index)))
            param.requires_grad_(trainable)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Declares that what runs inside is one backward, however many graph tasks it has."""
        self._explicit += 1
        try:
            yield
        finally:
            self._explicit -= 1
        if not self._explicit:
            self._over(declared=True)

    @property
    def running(self) -> bool:
        """Whether a backward is under way."""
        return bool(self._explicit or self._tasks)

    def remove(self) -> None:
        """Takes all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reset(self) -> None:
        """Forgets the backward under way, after a failure."""
        self._forwards.clear()
        self._tasks.clear()
        self._explicit = 0
        self._open.clear()
        self._waiting_for.clear()

    def abandon_stale(self) -> None:
        """If a backward ended in an exception that nobody reported, says so now; called outside of any backward."""
        if self._tasks and torch._C._current_graph_task_id() == -1:
            self.reset()
            self._events.backward_failed()

    def _pre_forward(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.abandon_stale()
        self._events.pre_forward(unit)
        call = _Call(self, unit)
        self._forwards.append(call)
        if unit.params and torch.is_grad_enabled():
            # now, not afterwards: the forward may change its inputs in place, and their gradients would come too early
            call.watch_inputs(tensors_in((args, kwargs)))

    def _post_forward(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._forwards or self._forwards[-1].unit is not unit:
            return  # torch calls this hook too when the one before the forward, or a user's, has raised
        call = self._forwards.pop()
        call.use = self._events.post_forward(unit, output)
        if call.use and torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(call.enter)

    def _gradient(self, index: int, param: Tensor) -> None:
        self._in_backward()
        grad, param.grad = param.grad, None
        if grad is not None:
            self._events.gradient(index, grad)
        for call in self._waiting_for.pop(index, ()):
            call.missing -= 1
            call.leave_if_over()

    def enter(self, call: _Call) -> None:
        """The backward of a call begins."""
        self._in_backward()
        self._open[call] = None
        for index in call.unit.params:
            if index in self._params and self._params[index].requires_grad:
                self._waiting_for.setdefault(index, []).append(call)
                call.missing += 1
        self._events.pre_backward(call.unit, call.use)

    def leave(self, call: _Call) -> None:
        """The backward of a call is over."""
        self._open.pop(call, None)
        self._events.post_backward(call.use)

    def _in_backward(self) -> None:
        if self._explicit:
            return
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.append(task)
            torch.autograd.Variable._execution_engine.queue_callback(self._task_over)

    def _task_over(self) -> None:
        self._tasks.pop()
        if not self._tasks and not self._explicit:
            self._over(declared=False)

    def _over(self, declared: bool) -> None:
        for call in list(self._open):
            call.leave()
        self._waiting_for.clear()
        self._events.backward_over(declared)


class _Call:
    """One forward of a unit, as its backward sees it."""

    def __init__(self, hooks: Hooks, unit: Unit) -> None:
        self.unit = unit
        self.use: Any = None
        self.missing = 0  # trainable gradients that are still to come
        self._hooks = hooks
        self._inputs = 0
        self._pending = 0  # inputs whose gradients are still to come
        self._is_open = False
        self._leaf_hooks: list[RemovableHandle] = []

    def watch_inputs(self, tensors: Iterator[Tensor]) -> None:
        for tensor in {id(t): t for t in tensors}.values():
            if not tensor.requires_grad or isinstance(tensor, nn.Parameter):
                continue  # a hook on a parameter would stay as long as the parameter
            handle = tensor.register_hook(self._input_done)
            if tensor.is_leaf:
                self._leaf_hooks.append(handle)
            self._inputs += 1

    def enter(self, _: Tensor) -> None:
        if not self._is_open:
            self._is_open = True
            self.missing, self._pending = 0, self._inputs
            self._hooks.enter(self)

    def leave(self) -> None:
        if self._is_open:
            self._is_open = False
            for handle in self._leaf_hooks:
                handle.remove()
            self._leaf_hooks.clear()
            self._hooks.leave(self)

    def leave_if_over(self) -> None:
        if self._inputs and self._pending <= 0 and self.missing == 0:
            self.leave()

    def _input_done(self, _: Tensor) -> None:
        self._pending -= 1
        self.leave_if_over()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, dicts and dataclasses (and what derives from them)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from tensors_in(getattr(value, item.name, None))
