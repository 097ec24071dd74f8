"""All optimizers of one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_gemini.core import optimizer_state
from lightning_gemini.core.chunk import Chunk
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.chunk_update import ChunkUpdate
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.store import Store
from lightning_gemini.core.update import OptimizerOnChunks


class Optimizers:
    """The user's optimizers, each with its chunks, in the order of the layout.

    Args:
        optimizers: the user's; they take over the states that some make in their constructors, such as Adagrad.
        policy: the dtypes.
        index_of: the parameters' indices in the layout.
        notice, may_update, updated, dropped, over: see :class:`OptimizerOnChunks`.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        store: Store,
        schedule: Schedule,
        gradients: Gradients,
        policy: DtypePolicy,
        index_of: Mapping[nn.Parameter, int],
        notice: Callable[[], None],
        may_update: Callable[[list[ChunkGradient]], bool],
        updated: Callable[[Chunk, list[bool]], None],
        dropped: Callable[[Iterable[nn.Parameter]], None],
        over: Callable[[], None],
    ) -> None:
        self._store = store
        self._index_of = index_of
        self._every = list(gradients.chunks.values())
        updates = [
            ChunkUpdate(store, gradient, optimizers[number], policy)
            for gradient in self._every
            if (number := gradient.chunk.spec.kind.optimizer) is not None
        ]
        self._known = [
            OptimizerOnChunks(
                optimizer,
                [u for u in updates if u.optimizer is optimizer],
                store,
                schedule,
                gradients,
                notice,
                may_update,
                updated,
                dropped,
                over,
            )
            for optimizer in optimizers
        ]
        store.beside.append(self)
        self._updates = {update.chunk.index: update for update in updates}
        self._places = {update.gradient: (chunks, update) for chunks in self._known for update in chunks.updates}
        self._handles = []
        for chunks in self._known:
            if state := chunks.optimizer.state:
                states: Mapping[Any, Any] = state
                by_index = {index_of[param]: dict(values) for param, values in states.items()}
                optimizer_state.load_states(chunks, store, by_index)
                state.clear()
            self._handles += optimizer_state.attach(chunks, store, index_of)

    def __iter__(self) -> Iterator[OptimizerOnChunks]:
        return iter(self._known)

    @property
    def stepping(self) -> bool:
        """Whether a step of any of them is under way, or ended in an exception half-way."""
        return any(chunks.stepping for chunks in self._known)

    @property
    def early(self) -> bool:
        """Whether any of them has updated chunks within the backward under way."""
        return any(chunks.early for chunks in self._known)

    def gradients(self, optimizer: Optimizer | None) -> list[ChunkGradient]:
        """The gradients of what ``optimizer`` updates; all there are if it is ``None``."""
        return self._every if optimizer is None else self.of(optimizer).gradients

    def update_now(self, gradient: ChunkGradient) -> None:
        """Updates the chunk of ``gradient`` within its backward."""
        chunks, update = self._places[gradient]
        chunks.update_now(update)

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """See :func:`optimizer_state.gather_state_dict`."""
        return optimizer_state.gather_state_dict(self.of(optimizer), self._store, self._index_of)

    def load_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """See :func:`optimizer_state.load_state_dict`."""
        optimizer_state.load_state_dict(self.of(optimizer), self._store, self._index_of, state)

    def beside_bytes(self, chunk: Chunk) -> int:
        """Bytes of the state of ``chunk``."""
        return self._updates[chunk.index].state_bytes if chunk.index in self._updates else 0

    def move(self, chunk: Chunk, tier: Tier) -> None:
        """Moves the state of ``chunk`` to another tier."""
        if chunk.index in self._updates:
            self._updates[chunk.index].move(tier)

    def abort(self) -> None:
        """After a failure: their groups hold the model's parameters again, and no update is under way."""
        for chunks in self._known:
            chunks.abort()

    def remove(self) -> None:
        """Makes them ordinary ones again, without state."""
        for chunks in self._known:
            chunks.remove()
        for handle in self._handles:
            handle.remove()

    def of(self, optimizer: Optimizer) -> OptimizerOnChunks:
        """The one of them that ``optimizer`` is.

        Raises:
            ConfigurationError: it is none of them.
        """
        for known in self._known:
            if known.optimizer is optimizer:
                return known
        raise ConfigurationError(f"this {type(optimizer).__name__} is none of the optimizers that were laid out")
