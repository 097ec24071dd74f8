"""The composition root: ``shard(model)`` makes an :class:`Engine` and keeps nothing but the phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gemini.core import norms, optimizer_state
from lightning_gemini.core.access import manage, unmanage
from lightning_gemini.core.average import ShardAverage
from lightning_gemini.core.buffers import Buffers
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.errors import (
    ConfigurationError,
    DisagreementError,
    GeminiError,
    StateError,
)
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.guard import Guard
from lightning_gemini.core.layout import Layout
from lightning_gemini.core.report import memory_report
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.step import Step
from lightning_gemini.core.store import Counters, Store
from lightning_gemini.core.summon import Summoner
from lightning_gemini.core.units import Unit
from lightning_gemini.core.update import ChunkUpdate, OptimizerOnChunks


class Phase(Enum):
    """What may be done with an engine."""

    LIVE = "live"  #: forward, backward, step
    SUMMONED = "summoned"  #: the parameters are ordinary tensors for a while; nothing is scheduled
    RELEASED = "released"  #: the model is an ordinary module again; nothing


class Engine:
    """One model in chunks. Made by :func:`lightning_gemini.core.shard`.

    Attributes:
        layout: which parameter lies in which chunk.
        store: the chunks, and the counters of what was moved.
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
        policy: DtypePolicy,
        check: bool = False,
    ) -> None:
        self.model = model
        self.layout: Layout = store.layout
        self.store = store
        self._phase = Phase.LIVE
        self._torn = False
        self._params = list(params)
        self._index_of = {param: index for index, param in enumerate(params)}
        self._schedule = Schedule(store)
        self._gradients = Gradients(store, policy)
        self._summoner = Summoner(store, params, dtypes)
        self._buffers = Buffers(model, store.collectives)
        self._buffers.sync_all()
        self.units = list(units)
        self._step = Step(
            params,
            self.units,
            store,
            self._schedule,
            self._gradients,
            check,
            lambda: self._phase is Phase.LIVE,
            self.abort,
        )
        self._guard = Guard(store.chunks, self.units, self._is_whole, lambda: self._phase is not Phase.LIVE)
        updates = {index: ChunkUpdate(store, gradient) for index, gradient in self._gradients.chunks.items()}
        self._state_hooks: list[RemovableHandle] = []
        self.optimizers = [
            OptimizerOnChunks(
                optimizer,
                [u for u in updates.values() if u.chunk.spec.kind.optimizer == index],
                store,
                self._schedule,
                self._gradients,
                self._step.notice_failure,
                self._before_update,
                self._guard.updated,
                self._step.stand_ins.forget,
            )
            for index, optimizer in enumerate(optimizers)
        ]
        for unit in self.units:
            manage(unit, self._step.read, self._step.hidden.listed, self._guard.before_copy)
        for chunks in self.optimizers:
            self._adopt_state(chunks)
            self._state_hooks += optimizer_state.attach(chunks, store, self._index_of)

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
        with self._step.backward():
            yield

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around the forward and backward of a micro-batch that no step follows: shards add up in fp32."""
        before, self._gradients.accumulating = self._gradients.accumulating, True
        try:
            yield
        finally:
            self._gradients.accumulating = before

    def abort(self) -> None:
        """Drops the forward and the backward under way. Weights, states and accumulated gradients stay."""
        self._step.reset()
        self._gradients.reset()
        self._schedule.reset()
        for optimizer in self.optimizers:
            optimizer.restore()

    def tear(self) -> None:
        """Says that chunks that are kept whole do not hold the weights on all of their parts any more."""
        self._torn = True

    def leave(self, error: BaseException) -> None:
        """This rank cannot go on because of ``error``; the other ranks end with its text instead of waiting for ever.

        What is on this rank stays, but nothing can be gathered any more. On one rank nothing happens.
        """
        text = str(error).strip()
        self.store.collectives.leave(f"{type(error).__name__}: {text}" if text else type(error).__name__)

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
        if module is not None:
            every = self.grad_norms(norm_type)
            wanted = {self.layout.params[self._index_of[p]].name for p in module.parameters() if p in self._index_of}
            parts = [norm for name, norm in every.items() if name in wanted]
            zero = torch.zeros((), device=self.store.device.device)
            norm: Tensor = torch.linalg.vector_norm(torch.stack([zero, *parts]), norm_type)
            return norm
        return norms.total_norm(self.store, self._agreed(optimizer), norm_type)

    def grad_norms(self, norm_type: float = 2.0) -> dict[str, Tensor]:
        """The norm of each parameter's gradient by the parameter's name; all ranks have to call."""
        return norms.norms_by_name(self.store, self._agreed(None), norm_type)

    def clip_grad_norm(self, optimizer: Optimizer | None, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales the gradients so that their norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does.

        Returns:
            the norm before, an fp32 scalar on the device.
        """
        norm = self.grad_norm(optimizer, norm_type)
        norms.clip_by_norm(self._gradients_of(optimizer), norm, max_norm)
        return norm

    def clip_grad_value(self, optimizer: Optimizer | None, clip_value: float) -> None:
        """Clamps each element of the gradients to ``[-clip_value, clip_value]``; all ranks have to call."""
        norms.clip_by_value(self._agreed(optimizer), clip_value)

    @contextmanager
    def summon(
        self,
        module: nn.Module | None = None,
        writeback: bool = False,
        rank0_only: bool = False,
        with_grads: bool = False,
    ) -> Iterator[None]:
        """Gives parameters their whole values, as ordinary tensors; on all ranks, which have to enter together.

        Args:
            module: only the parameters of this one and what is inside it.
            writeback: whether changes are kept; rank 0's count.
            rank0_only: leave the other ranks' parameters as they are, and put the values in host memory.
            with_grads: give parameters their whole gradients in ``.grad`` too, after a backward; changes are not kept.
        """
        self._require_live("summon parameters")
        if self._step.running:
            raise StateError("parameters cannot be summoned inside a forward or a backward; do it before or after")
        if writeback and rank0_only:
            raise ConfigurationError("summon with writeback=True needs the values on all ranks, not on rank 0 only")
        self._guard.check()
        self._schedule.reset()
        wanted = {self._index_of[p] for p in (module or self.model).parameters() if p in self._index_of}
        self._phase = Phase.SUMMONED
        try:
            where = self.store.host.device if rank0_only else self.store.device.device
            self._summoner.bind(wanted, where, everywhere=not rank0_only)
            self._step.stand_ins.forget()
            if with_grads:
                self._summoner.bind_grads(wanted, self._agreed(None), where, everywhere=not rank0_only)
            yield
            if writeback:
                self._summoner.write_back(wanted)
        finally:
            for param in self._params if with_grads else ():
                param.grad = None
            for chunk in self.store.chunks:
                chunk.rebind()
            self._step.stand_ins.place()
            self._guard.note()
            self._phase = Phase.LIVE

    def average(self) -> ShardAverage:
        """A new average of the weights, which starts as a copy of them; see :class:`ShardAverage`."""
        self._require_live("average the weights")
        return ShardAverage(self.store, self._schedule.renew)

    def memory_report(self) -> str:
        """This rank's bytes per tier, now and at the peak, and what has been moved."""
        return memory_report(self.store, self.moving)

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
        torn = self._torn or any(optimizer.stepping for optimizer in self.optimizers)
        self.abort()
        for optimizer in self.optimizers:
            optimizer.remove()
        for handle in self._state_hooks:
            handle.remove()
        self._step.remove()
        self._guard.remove()
        for unit in self.units:
            unmanage(unit)
        whole = True
        if keep_weights:
            self._summoner.bind(range(len(self._params)), self.store.host.device)
        else:
            whole = not torn and not self._schedule.moving
            for chunk in self.store.chunks:
                self._summoner.bind_kept(chunk) if whole else chunk.let_go()
        self._gradients.release()
        self.store.release()
        self._phase = Phase.RELEASED
        return whole

    def sync_buffers(self) -> None:
        """Gives all ranks rank 0's buffers, before an evaluation; every rank has to call."""
        self._buffers.sync_all()

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's whole state by parameter, in torch's own format, on rank 0; every rank has to call."""
        return optimizer_state.gather_state_dict(self._on_chunks(optimizer), self.store, self._index_of)

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Loads a whole state in torch's own format, which every rank has.

        Raises:
            ConfigurationError: it belongs to another optimizer; nothing is changed.
        """
        optimizer_state.load_state_dict(self._on_chunks(optimizer), self.store, self._index_of, state)

    def check_model(self) -> None:
        """Raises ConfigurationError if the model has other parameters than when it was laid out, StateError if one was
        given other values or another dtype since."""
        now = dict.fromkeys(self.model.parameters())
        new = [name for name, param in self.model.named_parameters() if param not in self._index_of]
        gone = [spec.name for spec, param in zip(self.layout.params, self._params, strict=True) if param not in now]
        if new or gone:
            raise ConfigurationError(
                "the model's parameters changed after the chunks were laid out: "
                + "; ".join(f"{what}: {', '.join(names)}" for what, names in (("new", new), ("gone", gone)) if names)
                + ". Change the model in __init__, setup or configure_model, before fit lays it out."
            )
        self._guard.check()

    def _before_update(self, gradients: list[ChunkGradient]) -> None:
        self._require_live("take a step")
        self._step.uses.check_idle()
        failure: GeminiError | None = None
        try:
            self._step.stand_ins.take()
            self._guard.check()
            self.store.tags.settle()
            self._step.hidden.settle()
        except GeminiError as error:
            failure = error
        failed, *changed = self._gradients.agree(gradients, [failure is not None, *self._buffers.changed()])
        if failed:
            self._gradients.discard(gradients)  # they may be what was wrong
            self._step.hidden.suspect()
        if failure is not None:
            raise failure
        if failed:
            raise DisagreementError("another rank could not take this step; no rank did, and the weights are unchanged")
        if any(changed):
            self._buffers.sync(changed)

    def _adopt_state(self, chunks: OptimizerOnChunks) -> None:
        """Some optimizers, such as Adagrad, make their state in the constructor."""
        state = chunks.optimizer.state
        if state:
            optimizer_state.load_states(chunks, self.store, self._by_index(state))
            state.clear()

    def _by_index(self, state: Mapping[Any, Any]) -> dict[int, dict[str, Any]]:
        return {self._index_of[param]: dict(values) for param, values in state.items()}

    def _is_whole(self) -> bool:
        exact = not self._schedule.moving and not self.store.masters
        return exact if self._phase is Phase.LIVE else True

    def _agreed(self, optimizer: Optimizer | None) -> list[ChunkGradient]:
        gradients = self._gradients_of(optimizer)
        self._gradients.agree(gradients, [])
        return gradients

    def _gradients_of(self, optimizer: Optimizer | None) -> list[ChunkGradient]:
        if optimizer is None:
            return list(self._gradients.chunks.values())
        return self._on_chunks(optimizer).gradients

    def _on_chunks(self, optimizer: Optimizer) -> OptimizerOnChunks:
        for known in self.optimizers:
            if known.optimizer is optimizer:
                return known
        raise ConfigurationError(f"this {type(optimizer).__name__} is none of the optimizers that were laid out")

    def _require_live(self, action: str) -> None:
        if self._phase is not Phase.LIVE:
            raise StateError(f"cannot {action} while the engine is {self._phase.value}")
