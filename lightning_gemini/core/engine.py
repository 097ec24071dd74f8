"""The composition root: ``shard(model)`` makes an :class:`Engine` and keeps nothing but the phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core import optimizer_state
from lightning_gemini.core.access import SavedTensors, manage, unmanage
from lightning_gemini.core.buffers import Buffers
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.errors import ConfigurationError, DisagreementError, StateError
from lightning_gemini.core.gradients import ChunkGradient, Gradients
from lightning_gemini.core.hooks import Hooks
from lightning_gemini.core.layout import Layout
from lightning_gemini.core.report import memory_report
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.store import Counters, Store
from lightning_gemini.core.summon import Summoner
from lightning_gemini.core.units import Unit
from lightning_gemini.core.update import ChunkUpdate, OptimizerOnChunks
from lightning_gemini.core.use import Use, Uses


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
    ) -> None:
        self.model = model
        self.layout: Layout = store.layout
        self.store = store
        self._phase = Phase.LIVE
        self._params = list(params)
        self._index_of = {param: index for index, param in enumerate(params)}
        self._schedule = Schedule(store)
        self._gradients = Gradients(store, policy)
        self._summoner = Summoner(store, params, dtypes)
        self._buffers = Buffers(model, store.collectives)
        self._buffers.sync_all()
        self.units = list(units)
        self._uses = Uses(store, self._schedule, self.units)
        self._saved = SavedTensors(store.chunks, self._uses.unpack)
        self._saved_context: AbstractContextManager[Any] | None = None
        updates = {index: ChunkUpdate(store, gradient) for index, gradient in self._gradients.chunks.items()}
        self.optimizers = [
            OptimizerOnChunks(
                optimizer,
                [u for u in updates.values() if u.chunk.spec.kind.optimizer == index],
                store,
                self._schedule,
                self._gradients,
                self._notice_failure,
                self._before_update,
            )
            for index, optimizer in enumerate(optimizers)
        ]
        trained = {i: p for i, p in enumerate(params) if self.layout.params[i].trainable}
        # parameters that are never freed need no forward hooks
        self._hooks = Hooks(self, self.units if self._schedule.moving else (), trained)
        for unit in self.units:
            manage(unit, self._read)
        for chunks in self.optimizers:
            self._adopt_state(chunks)

    @property
    def counters(self) -> Counters:
        return self.store.counters

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
        if not self._schedule.moving:
            yield
            return
        self._uses.enter_scope(name)
        try:
            with self._saved.hooks():
                yield
        except BaseException:
            self.abort()
            raise
        self._uses.exit_scope()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around one backward, or several that are to be reduced as one.

        Without it the end of a backward is found from autograd, which needs every rank to have a gradient in it.
        """
        self._require_live("run a backward")
        try:
            with self._hooks.backward():
                yield
        except BaseException:
            self.abort()
            raise

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
        self._hooks.reset()
        self._uses.reset()
        self._gradients.reset()
        self._schedule.reset()
        for optimizer in self.optimizers:
            optimizer.restore()

    def leave(self, error: BaseException) -> None:
        """This rank cannot go on because of ``error``; the other ranks end with its text instead of waiting for ever.

        What is on this rank stays, but nothing can be gathered any more. On one rank nothing happens.
        """
        self.abort()
        text = str(error).strip()
        self.store.collectives.leave(f"{type(error).__name__}: {text}" if text else type(error).__name__)

    def grad_norm(self, optimizer: Optimizer | None = None, norm_type: float = 2.0) -> Tensor:
        """The norm of the gradients that wait for the step, over all ranks; all of them have to call.

        Args:
            optimizer: only of what this one updates; of everything if ``None``.
            norm_type: the p of the p-norm, or infinity.

        Returns:
            an fp32 scalar on the device.
        """
        gradients = self._gradients_of(optimizer)
        self._gradients.agree(gradients, [])
        return self._gradients.norm(gradients, norm_type)

    def clip_grad_norm(self, optimizer: Optimizer | None, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales the gradients so that their norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does.

        Returns:
            the norm before, an fp32 scalar on the device.
        """
        norm = self.grad_norm(optimizer, norm_type)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in self._gradients_of(optimizer):
            if gradient.shard is not None:
                gradient.shard.mul_(factor.to(gradient.shard.device))
        return norm

    def clip_grad_value(self, optimizer: Optimizer | None, clip_value: float) -> None:
        """Clamps each element of the gradients to ``[-clip_value, clip_value]``; all ranks have to call."""
        gradients = self._gradients_of(optimizer)
        self._gradients.agree(gradients, [])
        for gradient in gradients:
            if gradient.shard is not None:
                gradient.shard.clamp_(-clip_value, clip_value)

    @contextmanager
    def summon(
        self, module: nn.Module | None = None, writeback: bool = False, rank0_only: bool = False
    ) -> Iterator[None]:
        """Gives parameters their whole values, as ordinary tensors; on all ranks, which have to enter together.

        Args:
            module: only the parameters of this one and what is inside it.
            writeback: whether changes are kept; rank 0's count.
            rank0_only: leave the other ranks' parameters as they are, and put the values in host memory.
        """
        self._require_live("summon parameters")
        if self._uses.running:
            raise StateError("parameters cannot be summoned inside a forward or a step; do it before or after")
        if writeback and rank0_only:
            raise ConfigurationError("summon with writeback=True needs the values on all ranks, not on rank 0 only")
        self._schedule.reset()
        wanted = {self._index_of[p] for p in (module or self.model).parameters() if p in self._index_of}
        self._phase = Phase.SUMMONED
        try:
            where = self.store.host.device if rank0_only else self.store.device.device
            self._summoner.bind(wanted, where, everywhere=not rank0_only)
            yield
            if writeback:
                self._summoner.write_back(wanted)
        finally:
            for chunk in self.store.chunks:
                chunk.rebind()
            self._phase = Phase.LIVE

    def memory_report(self) -> str:
        """This rank's bytes per tier, now and at the peak, and what has been moved."""
        return memory_report(self.store, self.moving)

    def release(self, keep_weights: bool = True) -> None:
        """Makes the model an ordinary module again, and the optimizers ordinary ones without state.

        Args:
            keep_weights: gather the whole weights into host memory on every rank, all of which have to call;
                otherwise parameters that are not whole here become placeholders.
        """
        if self._phase is Phase.RELEASED:
            return
        self.abort()
        for optimizer in self.optimizers:
            optimizer.remove()
        self._hooks.remove()
        for unit in self.units:
            unmanage(unit)
        if keep_weights or self.store.collectives.world_size == 1:
            self._summoner.bind(range(len(self._params)), self.store.host.device)
        else:
            for chunk in self.store.chunks:
                chunk.let_go()
        self._gradients.release()
        self.store.release()
        self._phase = Phase.RELEASED

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
        """Raises ConfigurationError if the model has other parameters than when it was laid out."""
        now = dict.fromkeys(self.model.parameters())
        new = [name for name, param in self.model.named_parameters() if param not in self._index_of]
        gone = [spec.name for spec, param in zip(self.layout.params, self._params, strict=True) if param not in now]
        if new or gone:
            raise ConfigurationError(
                "the model's parameters changed after the chunks were laid out: "
                + "; ".join(f"{what}: {', '.join(names)}" for what, names in (("new", new), ("gone", gone)) if names)
                + ". Change the model in __init__, setup or configure_model, before fit lays it out."
            )

    # What the hooks report (see hooks.Events)

    def pre_forward(self, unit: Unit) -> None:
        if self._phase is not Phase.LIVE:
            return
        outermost = not self._uses.running and torch._C._current_graph_task_id() == -1
        self._uses.pre_forward(unit)
        if outermost and torch.is_grad_enabled():
            self._saved_context = self._saved.hooks()
            self._saved_context.__enter__()

    def post_forward(self, unit: Unit) -> Use:
        if self._phase is not Phase.LIVE:
            return ()
        use = self._uses.post_forward(unit)
        if self._saved_context is not None and not self._uses.running:
            context, self._saved_context = self._saved_context, None
            context.__exit__(None, None, None)
        return use

    def pre_backward(self, unit: Unit, use: Use) -> None:
        self._uses.pre_backward(unit, use)

    def post_backward(self, use: Use) -> None:
        self._uses.post_backward(use)

    def gradient(self, param: int, grad: Tensor) -> None:
        self._gradients.add(param, grad)

    def backward_over(self) -> None:
        self._gradients.end_backward()
        self._uses.backward_over()

    def backward_failed(self) -> None:
        self.abort()

    def _read(self, param: nn.Parameter) -> None:
        if self._schedule.moving and self._phase is Phase.LIVE:
            index = self._index_of[param]
            self._uses.read(index, self.layout.params[index].name)

    def _notice_failure(self) -> None:
        self._hooks.abandon_stale()

    def _before_update(self, gradients: list[ChunkGradient]) -> None:
        self._require_live("take a step")
        self._uses.check_idle()
        failure: DisagreementError | None = None
        try:
            self.store.tags.settle()
        except DisagreementError as error:
            failure = error
        failed, *changed = self._gradients.agree(gradients, [failure is not None, *self._buffers.changed()])
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
