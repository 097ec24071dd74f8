"""The step under way: what hooks report becomes pins, gradients and watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gemini.core.access import SavedTensors
from lightning_gemini.core.course import Course
from lightning_gemini.core.drain import Drain
from lightning_gemini.core.errors import HiddenReadError, StateError
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.hidden import HiddenReads
from lightning_gemini.core.hooks import Hooks, tensors_in
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.stand_in import StandIns
from lightning_gemini.core.store import Store
from lightning_gemini.core.trace import Trace
from lightning_gemini.core.units import Unit
from lightning_gemini.core.use import Use, Uses


class Step:
    """Forward and backward of one model in chunks; what :class:`hooks.Events` asks for.

    Args:
        params: the managed parameters, in the order of the layout.
        check: whether every step is watched for reads that hooks cannot see.
        live: whether chunks are in charge of the parameters now.
        drain: ends a step that fails.
        recorded: called with the trace of a step that was recorded, and whether it was accumulating.

    Attributes:
        uses: who has pinned what.
        hidden: the reads that hooks cannot see.
        stand_ins: what is in ``p.grad``.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        units: Sequence[Unit],
        store: Store,
        schedule: Schedule,
        gradients: Gradients,
        check: bool,
        live: Callable[[], bool],
        drain: Drain,
        recorded: Callable[[Trace, bool], None],
    ) -> None:
        specs = store.layout.params
        self._names: Mapping[nn.Parameter, tuple[int, str]] = {
            param: (index, spec.name) for index, (param, spec) in enumerate(zip(params, specs, strict=True))
        }
        self._params = params
        self._tags = store.tags
        self._pulse = store.collectives.pulse
        self._schedule = schedule
        self._moving = schedule.moving
        self._gradients = gradients
        self._live = live
        self._drain = drain
        self._recorded = recorded
        self._scope: str | None = None  # the name of the step under way, if somebody gave one
        self._with_gradients = False  # whether they were on where it was given
        self._depth = 0  # of scopes in which no chunk moves
        self._backwards = 0  # in the step under way
        self.uses = Uses(store, schedule, units)
        self.hidden = HiddenReads(self.uses, self._names, check)
        self.stand_ins = StandIns(list(gradients.chunks.values()))
        self._saved = SavedTensors(store.chunks if self._moving else (), self.uses.unpack)
        self._outermost: ExitStack | None = None  # of a unit called outside of any step
        self._pauses: list[AbstractContextManager[Any]] = []
        pairs = enumerate(zip(params, specs, strict=True))
        trained = {index: param for index, (param, spec) in pairs if spec.trainable or spec.kind.updated}
        # parameters that are never freed need no forward hooks
        self._hooks = Hooks(self, units if self._moving else (), trained)

    @contextmanager
    def forward(self, name: str) -> Iterator[None]:
        """See :meth:`Engine.forward`."""
        if not self._moving:
            with self._pulse.step(name), self._unmoved(name):
                yield
            return
        outermost = not self.running
        if outermost:
            self.end(updates=False)  # of a forward that no backward has followed
            self._enter(name)
        self.uses.enter_scope(name)
        try:
            with self._pulse.step(name), self._saved.hooks(), self.hidden.watch(name):
                yield
            if not torch.is_grad_enabled():
                self._tags.settle()  # in training the update does
        except BaseException as error:
            self._fail(error)
            if isinstance(error, HiddenReadError):
                self.hidden.suspect()
            if isinstance(error, RuntimeError) and "support saved tensor hooks" in str(error):
                raise StateError(f"the model {_TRANSFORMS}") from error
            raise
        self.uses.exit_scope()
        if outermost and (self._backwards or not torch.is_grad_enabled()):
            self.end(updates=False)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """See :meth:`Engine.backward`."""
        try:
            self.stand_ins.take()
            watched = self.hidden.watch("backward") if self._moving else nullcontext()
            with self._pulse.step("a backward"), self._hooks.backward(), watched:
                yield
        except BaseException as error:
            self._fail(error)
            raise

    @contextmanager
    def _unmoved(self, name: str) -> Iterator[None]:
        """A step in which chunks stay where they are: there is nothing to be done unless it fails."""
        if not self._depth:
            self.end(updates=False)
            self._enter(name)
        self._depth += 1
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._depth -= 1

    def _enter(self, name: str) -> None:
        # a reentrant checkpoint turns gradients off within a step that has some
        self._scope, self._with_gradients = name, torch.is_grad_enabled()

    def _fail(self, error: BaseException) -> None:
        """Ends the step under way; raises if that is to be done with another error."""
        raised = self._drain.end(error, self)
        if raised is not error:
            raise raised

    @property
    def begun(self) -> bool:
        """Whether a step has begun, by name or in a backward, and no update has come since."""
        if self._moving and self._schedule.course is not Course.NONE:
            return True
        return self._scope is not None if self._moving else self._scope is not None or self._hooks.running

    @property
    def kind(self) -> str:
        """What kind of step is under way."""
        name = self._scope or "step"
        expected = self._with_gradients or torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1
        if not expected:
            return f"{name} without gradients"
        return f"{name}, accumulating" if self._gradients.accumulating else name

    def end(self, updates: bool) -> None:
        """The step under way is over, if there is one; ``updates`` tells whether an update follows."""
        self._scope, self._with_gradients, self._backwards = None, False, 0
        self._drain.step_over()
        trace = self._schedule.end(updates)
        if trace is not None:
            self._recorded(trace, self._gradients.accumulating)
        if not updates:
            self._schedule.resume()

    def reset(self) -> None:
        """Forgets the forward and the backward under way."""
        self._pulse.abandon()
        self._scope, self._with_gradients, self._backwards = None, False, 0
        self._drain.step_over()
        self.let_go()

    def let_go(self) -> None:
        """Drops what is held of modules and of autograd's graph, but not the name of the step."""
        self.stand_ins.forget()
        self._hooks.reset()
        self.uses.reset()

    def remove(self) -> None:
        """Takes all hooks off."""
        self._hooks.remove()

    @property
    def running(self) -> bool:
        """Whether a forward or a backward is under way."""
        return self.uses.running or self._hooks.running

    def notice_failure(self) -> None:
        """Finds out about a backward that failed and that nobody reported."""
        self._hooks.abandon_stale()

    def read(self, param: nn.Parameter) -> None:
        """A parameter is read through its module, outside of its unit's forward."""
        if self._moving and self._live():
            self.uses.read(*self._names[param])

    # What the hooks report (see hooks.Events)

    def pre_forward(self, unit: Unit) -> None:
        if not self._live():
            return
        _refuse_transforms(unit)
        outermost = not self.uses.running and torch._C._current_graph_task_id() == -1
        self.uses.pre_forward(unit)
        if outermost:
            self._outermost = ExitStack()
            self._outermost.enter_context(self._pulse.step(unit.name))
            self._outermost.enter_context(self.hidden.watch(unit.name))
            if torch.is_grad_enabled():
                self._outermost.enter_context(self._saved.hooks())
        if unit.compiled:
            self._pauses.append(self.hidden.pause())
            self._pauses[-1].__enter__()

    def post_forward(self, unit: Unit, output: Any) -> Use:
        if not self._live():
            return ()
        if unit.compiled:
            self._pauses.pop().__exit__(None, None, None)
        use = self.uses.post_forward(unit)
        for tensor in tensors_in(output) if use else ():
            if (chunk := self._saved.chunk_of(tensor)) is not None:
                self.uses.hand_up(chunk, unit.name)
        if self._outermost is not None and not self.uses.running:
            contexts, self._outermost = self._outermost, None
            contexts.close()
            if not torch.is_grad_enabled():
                self.end(updates=False)
        return use

    def pre_backward(self, unit: Unit, use: Use) -> None:
        self.uses.pre_backward(unit, use)

    def post_backward(self, use: Use) -> None:
        self.uses.post_backward(use)

    def gradient(self, param: int, grad: Tensor) -> None:
        self._gradients.add(param, self.stand_ins.received(self._params[param], grad))

    def backward_over(self, declared: bool) -> None:
        ends = declared or self._gradients.begun  # autograd.grad leaves no gradient anywhere
        if ends:
            self._gradients.end_backward()
            self._drain.backward_over(self.kind)
        self.uses.backward_over()
        self.stand_ins.place()
        self._backwards += 1
        if self._moving and ends and not self.uses.running:
            self.end(updates=not self._gradients.accumulating)

    def backward_failed(self) -> None:
        self._drain.abort()


def _refuse_transforms(unit: Unit) -> None:
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() != torch._C._functorch.TransformType.Vmap:
        raise StateError(f"{unit.name} {_TRANSFORMS}")


#: torch.func differentiates without saved-tensor hooks, and says so itself if it finds some.
_TRANSFORMS = (
    "runs inside torch.func.grad, jvp or what builds on them, which cannot follow chunks that are freed and fetched. "
    "Use torch.autograd.grad, or keep all chunks unsharded: placement='device' with room for them."
)
