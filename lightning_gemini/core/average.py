"""An average of the weights over steps, kept as shards beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from lightning_gemini.core.chunk import Chunk
from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.masters import Master
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.store import Store, flatten_like


class ShardAverage:
    """Averages what optimizers update, in fp32: 4 bytes per parameter and rank, on the tier of the parameter's shard.

    Starts as a copy of the weights.

    Args:
        renew: called for a chunk whose shard has changed.
    """

    def __init__(self, store: Store, renew: Callable[[Chunk], None]) -> None:
        self._store = store
        self._renew = renew
        self._averages: dict[int, Tensor] = {}
        self._backups: dict[int, Tensor] = {}
        self._counted: Counter[int] = Counter()
        store.beside.append(self)
        for chunk in store.chunks:
            if chunk.spec.kind.updated and chunk.spec.kind.dtype.is_floating_point:
                truth = self._store.truth(chunk)
                self._store.tier_of(chunk).take(truth.numel() * 4, f"the average of chunk {chunk.index}")
                # and as much as it replaces while it is applied
                self._counted[chunk.index] = truth.numel() * 4 + truth.nbytes
                with torch.inference_mode(False):
                    self._averages[chunk.index] = truth.detach().to(torch.float32, copy=True)

        store.extra_bytes.update(self._counted)

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Moves the average towards the weights: ``average += weight * (weights - average)``; after their update."""
        for index, average in self._averages.items():
            chunk, master = self._store.chunks[index], self._store.masters.get(index)
            chunk.after_update(partial(_move_towards, average, chunk, master, weight))

    @torch.no_grad()
    def apply(self) -> None:
        """Puts the average in the weights' place until :meth:`restore`; all ranks have to call."""
        for index, average in self._averages.items():
            chunk = self._store.chunks[index]
            truth = self._store.truth(chunk)
            self._store.tier_of(chunk).take(
                truth.nbytes, f"the weights of chunk {index} while their average is in their place"
            )
            self._backups[index] = truth.clone()
            self._write(chunk, average)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back; all ranks have to call."""
        for index, backup in self._backups.items():
            chunk = self._store.chunks[index]
            self._write(chunk, backup)
            self._store.tier_of(chunk).give(backup.nbytes)
        self._backups.clear()

    @torch.no_grad()
    def abandon(self) -> None:
        """Puts the weights back into this rank's shards, after a failure: waits for nobody."""
        for index, backup in self._backups.items():
            self._put(self._store.chunks[index], backup)
        self.release()

    def keep(self) -> None:
        """Leaves the average in the weights' place for good, after :meth:`apply`."""
        for index, backup in self._backups.items():
            self._store.tier_of(self._store.chunks[index]).give(backup.nbytes)
        self._backups.clear()

    def parts(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Each chunk that is averaged, and this rank's part of its average, fp32."""
        for index, average in self._averages.items():
            yield self._settled(index), average

    def gather(self) -> dict[str, Tensor]:
        """The whole average by parameter name, fp32 in host memory, on rank 0; all ranks have to call."""
        whole: dict[str, Tensor] = {}
        for index, average in self._averages.items():
            chunk = self._settled(index)
            flat = self._store.assemble(index, average)
            if self._store.collectives.rank == 0:
                whole |= {name: chunk.view_in(flat, slot).clone().cpu() for slot, name in enumerate(chunk.names)}
        return whole

    @torch.no_grad()
    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Replaces the average by what :meth:`gather` gave, which every rank has.

        Raises:
            ConfigurationError: it is of other parameters; nothing is changed.
        """
        names = {name for index in self._averages for name in self._store.chunks[index].names}
        if names != whole.keys():
            odd = sorted(names ^ whole.keys())
            raise ConfigurationError(
                f"the saved average is of other parameters than the model's: {', '.join(odd[:3])} and possibly others "
                "are in one of them only. Resume with the same model and optimizers, or without the callback's state."
            )
        for index, average in self._averages.items():
            chunk = self._settled(index)
            for slot, name in enumerate(chunk.names):
                flat = flatten_like(whole[name], chunk.strides[slot], average.dtype)
                self._store.copy_own(index, chunk.spec.slots[slot], flat, average)

    def release(self) -> None:
        """Gives the memory back."""
        self.keep()
        for index, average in self._averages.items():
            chunk = self._store.chunks[index]
            self._store.tier_of(chunk).give(average.nbytes)
        self._averages.clear()
        self._store.extra_bytes.subtract(self._counted)
        self._counted.clear()
        if self in self._store.beside:
            self._store.beside.remove(self)

    def beside_bytes(self, chunk: Chunk) -> int:
        """Bytes of the average of ``chunk``, and of the weights whose place it has taken."""
        held = (self._averages.get(chunk.index), self._backups.get(chunk.index))
        return sum(value.nbytes for value in held if value is not None)

    def move(self, chunk: Chunk, tier: Tier) -> None:
        """Moves what belongs to ``chunk`` to another tier."""
        for held in (self._averages, self._backups):
            if (value := held.get(chunk.index)) is not None:
                what = f"the average of chunk {chunk.index}"
                tier.take(value.nbytes, what)
                try:
                    moved = tier.empty(value.numel(), value.dtype, what).copy_(value)
                except BaseException:
                    tier.give(value.nbytes)
                    raise
                (self._store.host if tier is self._store.device else self._store.device).give(value.nbytes)
                held[chunk.index] = moved

    def _settled(self, index: int) -> Chunk:
        """A chunk whose average is what it is to be."""
        chunk = self._store.chunks[index]
        _ = chunk.shard  # the average follows an update that may be under way
        return chunk

    def _write(self, chunk: Chunk, values: Tensor) -> None:
        self._put(chunk, values)
        self._renew(chunk)

    def _put(self, chunk: Chunk, values: Tensor) -> None:
        self._store.put(chunk, 0, values)


def _move_towards(average: Tensor, chunk: Chunk, master: Master | None, weight: float) -> None:
    """May run in another thread; see :meth:`Chunk.after_update`."""
    shard = chunk.unfinished_shard
    truth = shard if master is None else master.values(shard)
    average.lerp_(truth if truth.dtype == average.dtype else truth.to(average.dtype), weight)
