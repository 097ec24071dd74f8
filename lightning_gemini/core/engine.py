"""The composition root: ``shard(model)`` makes an :class:`Engine` and keeps nothing but the phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core.access import manage, unmanage
from lightning_gemini.core.average import ShardAverage
from lightning_gemini.core.ballot import Ballot
from lightning_gemini.core.buffers import Buffers
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.construct import WeightSource
from lightning_gemini.core.counters import Counters
from lightning_gemini.core.drain import Drain
from lightning_gemini.core.errors import ConfigurationError, StateError
from lightning_gemini.core.failure import Failures, in_a_word
from lightning_gemini.core.footprint import Footprints
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.guard import Guard, require_same_parameters
from lightning_gemini.core.layout import Layout
from lightning_gemini.core.norms import Norms
from lightning_gemini.core.optimizers import Optimizers
from lightning_gemini.core.phase import Phase
from lightning_gemini.core.placement import Placement, PlacementPolicy
from lightning_gemini.core.report import memory_report
from lightning_gemini.core.rest import Rest
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.step import Step
from lightning_gemini.core.store import Store
from lightning_gemini.core.summon import Summoner
from lightning_gemini.core.timeline import Timeline
from lightning_gemini.core.units import Unit
from lightning_gemini.core.verdict import N_FLAGS, Verdict


class Engine:
    """One model in chunks. Made by :func:`lightning_gemini.core.shard`.

    Attributes:
        layout: which parameter lies in which chunk.
        store: the chunks, and the counters of what was moved.
        index_of: the place of each parameter in the layout.
        optimizers: the optimizers that update them, in the order of the layout.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        dtypes: Sequence[torch.dtype],
        store: Store,
        optimizers: Sequence[Optimizer],
        units: Sequence[Unit],
        footprints: Footprints,
        placement: PlacementPolicy,
        check: bool = False,
    ) -> None:
        self.model = model
        self.layout: Layout = store.layout
        self.store = store
        self._phase = Phase.LIVE
        self._params = list(params)
        self.index_of = {param: index for index, param in enumerate(params)}
        policy, self._update = footprints.policy, footprints.update
        self._schedule = Schedule(store, lambda: self._step.kind)
        self._gradients = Gradients(store, policy)
        self._placement = Placement(store, self._schedule, self._gradients, footprints, placement, bool(optimizers))
        self._buffers = Buffers(model, store.collectives)
        self._buffers.sync_all()
        self._failures = Failures(store.collectives, store.device.device, self.abort, self._gradients.discard)
        self._ballot = Ballot(store, self._gradients, self._failures, N_FLAGS + len(self._buffers.changed()))
        self._norms = Norms(store, self._ballot)
        self._summoner = Summoner(store, params, dtypes)
        self.units = list(units)
        drain = Drain(store, self._schedule, self._gradients, self._ballot, self._failures, self)
        events = (check, self._is_live, drain, self._placement.recorded)
        self._step: Step = Step(params, self.units, store, self._schedule, self._gradients, *events)
        self._guard = Guard(store.chunks, self.units, self._is_whole, lambda: not self._is_live())
        at_rest = (self._require_live, self._failures.require_whole, self._enter)
        self._rest = Rest(store, self._schedule, self._step, self._guard, self._summoner, self._ballot, *at_rest)
        parts = (self._gradients, self._ballot, self._buffers, self._step.hidden.suspect, self._placement)
        self._verdict = Verdict(store, *parts, self._update)
        notice, dropped, updated = self._step.notice_failure, self._step.stand_ins.forget, self._guard.updated
        chunks = (store, self._schedule, self._gradients, policy, self.index_of)
        calls = (notice, self._may_update, updated, dropped, self._after_update)
        self.optimizers = Optimizers(optimizers, *chunks, *calls)
        if self._update.when == "in_backward":
            self._gradients.consume = self._consume
        for unit in self.units:
            manage(unit, self._step.read, self._step.hidden.listed, self._guard.before_copy)

    @property
    def counters(self) -> Counters:
        return self.store.counters

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, whole and in the dtypes that they had before the layout."""
        return self._summoner.nbytes

    @property
    def moving(self) -> bool:
        """Whether chunks are freed and unsharded again during a step."""
        return self._schedule.moving

    @contextmanager
    def forward(self, name: str = "step") -> Iterator[None]:
        """Around a step that is more than one call of the model: parameters may be read anywhere inside.

        An exception inside drops what was under way; weights and optimizer states stay as they were.
        """
        self._require_live("run a step")
        with self._step.forward(name):
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around one backward, or several that are to be reduced as one.

        Without it the end of a backward is found from autograd, which needs every rank to have a gradient in it, and
        reads that no hook sees are not watched for. Afterwards ``p.grad`` says where the gradient is, either way.
        """
        self._require_live("run a backward")
        try:
            with self._step.backward():
                yield
        except RuntimeError as error:
            if self._gradients.consume is not None and "inplace operation" in str(error):
                error.add_note(
                    "With update='in_backward' a weight is updated when all of its gradients are in, but here it was "
                    "needed once more (is it used detached, too?). Use update='at_step'."
                )
            raise

    @contextmanager
    def accumulate(self, hear: bool = False) -> Iterator[None]:
        """Around the forward and backward of a micro-batch that no step follows: shards add up in fp32.

        At its end, with ``hear``, or at the next use of the engine it raises if it failed on another rank.
        """
        self._require_waiting_gradients("accumulate gradients")
        before, self._gradients.accumulating = self._gradients.accumulating, True
        try:
            yield
        finally:
            self._gradients.accumulating = before
        if hear:
            self._failures.check()

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale, if there is one, at least in fp32; gradients are read without it again."""
        if self._update.loss_scale is None:
            return loss
        self._gradients.loss_scale = self._update.loss_scale.value
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self._gradients.loss_scale

    def abort(self) -> None:
        """Drops the forward and the backward under way. Weights, states and accumulated gradients stay."""
        self._step.reset()
        self._gradients.reset()
        self._schedule.reset()
        self.optimizers.abort()

    def tear(self) -> None:
        """Says that chunks that are kept whole do not hold the weights on all of their parts any more."""
        self._failures.torn = True

    def leave(self, error: BaseException) -> None:
        """This rank cannot go on because of ``error``; the other ranks end with its text instead of waiting for ever.

        What is on this rank stays, but nothing can be gathered any more. On one rank nothing happens.
        """
        self._failures.torn |= self.optimizers.stepping
        self.store.collectives.leave(in_a_word(error))

    def doubt(self, loss: Tensor) -> None:
        """Has the next step fail if ``loss`` is not finite though it should be; see ``hidden``."""
        if self._schedule.moving:
            self._step.hidden.doubt(loss)

    @property
    def hidden_reads(self) -> list[str]:
        """The parameters that were read in ways that no hook sees, as far as steps were watched."""
        return list(self._step.hidden.found)

    def grad_norm(
        self, optimizer: Optimizer | None = None, norm_type: float = 2.0, module: nn.Module | None = None
    ) -> Tensor:
        """The norm of the gradients that wait for the step, over all ranks; all of them have to call.

        Args:
            optimizer: only of what this one updates; of everything if ``None``.
            norm_type: the p of the p-norm, or infinity.
            module: only of the parameters of this one and what is inside it.

        Returns:
            an fp32 scalar on the device.
        """
        self._require_waiting_gradients("read the norm of gradients")
        gradients = self.optimizers.gradients(optimizer)
        if module is None:
            return self._norms.total(gradients, norm_type)
        names = {self.layout.params[self.index_of[p]].name for p in module.parameters() if p in self.index_of}
        return self._norms.of(names, gradients, norm_type)

    def grad_norms(self, norm_type: float = 2.0) -> dict[str, Tensor]:
        """The norm of each parameter's gradient by the parameter's name; all ranks have to call."""
        self._require_waiting_gradients("read the norms of gradients")
        return self._norms.by_name(self.optimizers.gradients(None), norm_type)

    def clip_grad_norm(self, optimizer: Optimizer | None, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales the gradients so that their norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does.

        Returns:
            the norm before, an fp32 scalar on the device.
        """
        self._require_waiting_gradients("clip gradients")
        return self._norms.clip(self.optimizers.gradients(optimizer), max_norm, norm_type)

    def clip_grad_value(self, optimizer: Optimizer | None, clip_value: float) -> None:
        """Clamps each element of the gradients to ``[-clip_value, clip_value]``; all ranks have to call."""
        self._require_waiting_gradients("clip gradients")
        self._norms.clamp(self.optimizers.gradients(optimizer), clip_value)

    @contextmanager
    def summon(
        self,
        module: nn.Module | None = None,
        writeback: bool = False,
        rank0_only: bool = False,
        with_grads: bool = False,
        exact: bool = False,
    ) -> Iterator[None]:
        """Gives parameters their whole values, as ordinary tensors; on all ranks, which have to enter together.

        Args:
            module: only the parameters of this one and what is inside it.
            writeback: whether changes are kept; rank 0's count. Implies ``exact``, so that nothing is rounded.
            rank0_only: leave the other ranks' parameters as they are, and put the values in host memory.
            with_grads: give parameters their whole gradients in ``.grad`` too, after a backward; changes are not kept.
            exact: give parameters that have a master its fp32 values, whatever dtype they were built in.
        """
        if writeback and rank0_only:
            raise ConfigurationError("summon with writeback=True needs the values on all ranks, not on rank 0 only")
        wanted = {self.index_of[p] for p in (module or self.model).parameters() if p in self.index_of}
        gradients = self.optimizers.gradients(None) if with_grads else []
        with self._rest.begin("summon parameters"):
            with self._rest.summoned(wanted, gradients, rank0_only, exact or writeback):
                yield
            if writeback:
                self._summoner.write_back(wanted)

    def loading(self) -> AbstractContextManager[Callable[[WeightSource], None]]:
        """Around ``load_state_dict()``, between two steps; gives a function that replaces weights by those of a source.

        All ranks enter, and call it. If it fails some weights are new and others old, and no step is taken any more.
        """
        return self._rest.loading(self.index_of, self.tear)

    def saving(self) -> AbstractContextManager[None]:
        """Around a look at the state between two steps: ``state_dict()`` may be called for the names that are in it.

        Raises:
            StateError: a step is under way, or a parameter was written to unnoticed.
        """
        return self._rest.saving()

    def average(self) -> ShardAverage:
        """A new average of the weights, which starts as a copy of them; see :class:`ShardAverage`."""
        self._require_live("average the weights")
        return ShardAverage(self.store, self._schedule.renew)

    def memory_report(self) -> str:
        """This rank's chunks and bytes per tier, now and at the peak, what a step moves, and what has been moved."""
        updates = (update for chunks in self.optimizers for update in chunks.updates)
        known, waiting = self._schedule.playbook.known, self._gradients.consume is None
        return memory_report(self.store, known, updates, waiting)

    def timeline(self) -> Timeline:
        """One step that went by its plan, as data to be drawn; without moments if there was none."""
        return self._schedule.journal.timeline(self.memory_report())

    def rebudget(self, device_memory: int | None) -> None:
        """Plans for another size of the device from now on; between two steps, and all ranks call.

        Args:
            device_memory: bytes that chunks may use on the device, ``None`` for no bound; the ranks' least counts.

        Raises:
            OutOfBudgetError: what is known of the steps does not fit; the old size stays.
        """
        self._require_live("change its memory")
        self._placement.rebudget(device_memory)

    def release(self, keep_weights: bool = True) -> bool:
        """Makes the model an ordinary module again, and the optimizers ordinary ones without state.

        Args:
            keep_weights: gather the whole weights into host memory on every rank, all of which have to call;
                otherwise parameters that are not whole here become placeholders.

        Returns:
            whether the model has its weights.
        """
        if self._phase is Phase.RELEASED:
            return True
        self.store.host_updates.close()
        torn = self._failures.torn or self.optimizers.stepping
        self.abort()
        self.optimizers.remove()
        self._step.remove()
        self._guard.remove()
        for unit in self.units:
            unmanage(unit)
        whole = self._summoner.hand_back(keep_weights, kept=not torn and not self._schedule.moving)
        self._gradients.release()
        self.store.release()
        self._phase = Phase.RELEASED
        return whole

    def sync_buffers(self) -> None:
        """Gives all ranks rank 0's buffers, before an evaluation; every rank has to call."""
        self._buffers.sync_all()

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's whole state by parameter, in torch's own format, on rank 0; every rank has to call."""
        return self.optimizers.state_dict(optimizer)

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Loads a whole state in torch's own format, which every rank has.

        Raises:
            ConfigurationError: it belongs to another optimizer; nothing is changed.
        """
        self.optimizers.load_state_dict(optimizer, state)

    def check_model(self) -> None:
        """Raises ConfigurationError if the model has other parameters than when it was laid out, StateError if one was
        given other values or another dtype since."""
        require_same_parameters(self.model, self._params, [spec.name for spec in self.layout.params])
        self._guard.check()

    def _may_update(self, gradients: list[ChunkGradient]) -> bool:
        self._require_phase("take a step")  # what has failed in the background is for all ranks to hear of
        self._step.uses.check_idle()
        self._step.end(updates=True)
        if may := self._verdict.may_update(gradients, self._inspect):
            self._placement.make_room_for(gradients)
        return may

    def _after_update(self) -> None:
        """Chunks that the next step begins with can be on their way, if no other optimizer is about to change them."""
        if not any(gradient.shard is not None for gradient in self._gradients.chunks.values()):
            self._schedule.resume()

    def _inspect(self) -> None:
        """Raises GeminiError if this rank cannot take a step."""
        self.store.host_updates.check()
        self._failures.require_whole()
        self._step.stand_ins.take()
        self._guard.check()
        self.store.tags.settle()
        self._step.hidden.settle(self._update.skips)

    def _consume(self, gradient: ChunkGradient) -> None:
        """Updates a chunk as soon as its gradient is reduced."""
        self._verdict.note_use(gradient)
        self.optimizers.update_now(gradient)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase

    def _is_live(self) -> bool:
        return self._phase is Phase.LIVE

    def _is_whole(self) -> bool:
        return not self._is_live() or (not self._schedule.moving and not self.store.masters)

    def _require_waiting_gradients(self, action: str) -> None:
        if self._gradients.consume is not None:
            raise StateError(
                f"cannot {action}: with update='in_backward' each gradient is used and dropped as it comes. Use "
                "update='at_step'."
            )

    def _require_live(self, action: str) -> None:
        self._require_phase(action)
        with self._failures.ends_all():
            self.store.host_updates.check()
        self._failures.check()

    def _require_phase(self, action: str) -> None:
        if self._phase is not Phase.LIVE:
            raise StateError(f"cannot {action} while the engine is {self._phase.value}")
