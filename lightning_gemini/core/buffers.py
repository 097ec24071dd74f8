"""Buffers (running statistics and the like): not sharded, and rank 0's where ranks differ, as under DDP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_gemini.core.collectives import Collectives


class Buffers:
    """The buffers of a model, and which of them change."""

    def __init__(self, root: nn.Module, collectives: Collectives) -> None:
        self._collectives = collectives
        self._places = [
            (module, key)
            for module in root.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None and buffer.numel()
        ]
        self._seen = self._marks()

    def changed(self) -> list[bool]:
        """For each buffer, whether it was written to or replaced on this rank since the last :meth:`sync`."""
        return [now != before for now, before in zip(self._marks(), self._seen, strict=True)]

    def sync(self, which: Sequence[bool]) -> None:
        """Brings rank 0's values of the buffers that ``which`` marks, the same on all ranks, to the others."""
        if self._collectives.world_size > 1:
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for (module, key), flag in zip(self._places, which, strict=True):
                buffer = module._buffers[key]
                if flag and buffer is not None:
                    by_dtype.setdefault(buffer.dtype, []).append(buffer)
            with torch.no_grad():
                for buffers in by_dtype.values():
                    flat = self._collectives.broadcast(torch.cat([buffer.flatten() for buffer in buffers]))
                    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                        buffer.copy_(part.view_as(buffer))
        self._seen = self._marks()

    def sync_all(self) -> None:
        """Brings all of rank 0's values to the others; every rank has to call."""
        self.sync([True] * len(self._places))

    def _marks(self) -> list[tuple[int, int]]:
        buffers = (module._buffers[key] for module, key in self._places)
        return [(id(b), 0 if b is None or b.is_inference() else b._version) for b in buffers]
