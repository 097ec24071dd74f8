"""Whole parameters outside a step: for a moment, or for good."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_gemini.core.chunk import Chunk
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.store import Store


class Summoner:
    """Gathers whole parameters out of the chunks, at the precision the optimizer has them in.

    Args:
        store: the chunks.
        params: the parameters by index.
        dtypes: the dtypes the parameters had before they were laid out, which summoned ones have again.
    """

    def __init__(self, store: Store, params: Sequence[nn.Parameter], dtypes: Sequence[torch.dtype]) -> None:
        self._store = store
        self._params = params
        self._dtypes = dtypes

    @property
    def nbytes(self) -> int:
        """What all of them take, whole."""
        return sum(p.numel() * dtype.itemsize for p, dtype in zip(self._params, self._dtypes, strict=True))

    def values(
        self, wanted: Collection[int], device: torch.device, everywhere: bool = True, exact: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields the index and a copy on ``device`` of each wanted parameter, one chunk in memory at a time.

        All ranks have to iterate to the end.

        Args:
            everywhere: whether ranks other than 0 want the values; if not, they take part and yield nothing.
            exact: in fp32 where there is a master, whatever dtype the parameter had.
        """
        layout = self._store.layout
        mine = everywhere or self._store.collectives.rank == 0
        for spec in layout.chunks:
            slots = [slot for slot in spec.slots if slot.param in wanted]
            if not slots:
                continue
            flat = self._store.read(spec.index)
            wide = exact and spec.index in self._store.masters
            for slot in slots if mine else ():
                info = layout.params[slot.param]
                value = flat.as_strided(info.shape, info.stride, slot.offset)
                # a copy: a view would keep the whole chunk alive, and be saved with it
                dtype = flat.dtype if wide else self._dtypes[slot.param]
                out = torch.empty_strided(info.shape, info.stride, dtype=dtype, device=device)
                yield slot.param, out.copy_(value)

    def bind(self, wanted: Collection[int], device: torch.device, everywhere: bool = True, exact: bool = False) -> None:
        """Gives parameters their whole values as ordinary tensors; they are no views of their chunks any more."""
        for index, value in self.values(wanted, device, everywhere, exact):
            self._params[index].data = value

    def hand_back(self, gather: bool, kept: bool) -> bool:
        """Gives parameters their values in host memory for good, or placeholders.

        Args:
            gather: from all ranks, which have to call; otherwise nobody else takes part.
            kept: whether the chunks are whole on this rank.

        Returns:
            whether the parameters have their values.
        """
        if gather:
            self.bind(range(len(self._params)), self._store.host.device)
            return True
        for chunk in self._store.chunks:
            self._bind_kept(chunk) if kept else chunk.let_go()
        return kept

    def _bind_kept(self, chunk: Chunk) -> None:
        for slot, (param, place) in enumerate(zip(chunk.params, chunk.spec.slots, strict=True)):
            param.data = chunk.view(slot).to(self._store.host.device, self._dtypes[place.param], copy=True)

    def bind_grads(
        self, wanted: Collection[int], gradients: Sequence[ChunkGradient], device: torch.device, everywhere: bool = True
    ) -> None:
        """Gives wanted parameters that have a gradient the whole of it in ``.grad``, a copy; after :meth:`bind`."""
        for gradient in gradients:
            chunk = gradient.chunk
            slots = [s for s, place in enumerate(chunk.spec.slots) if place.param in wanted and gradient.used[s]]
            if gradient.shard is None or not slots:
                continue
            flat = self._store.assemble(chunk.index, gradient.scaled())
            for slot in slots if everywhere or self._store.collectives.rank == 0 else ():
                param = chunk.params[slot]
                param.grad = chunk.view_in(flat, slot).to(device, param.dtype, copy=True)

    def write_back(self, wanted: Collection[int]) -> None:
        """Stores what the parameters hold now; rank 0's values, where ranks differ."""
        for index in sorted(wanted):
            value = self._params[index].detach().to(self._store.device.device).contiguous()
            self._store.write(index, self._store.collectives.broadcast(value))
