"""The fp32 values behind one chunk's shard."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gemini.core.dtypes import MasterWeights
from lightning_gemini.core.memory import Tier
from lightning_gemini.optim.masters import join, low_half, round_to_compute


class Master:
    """The master weights of a shard, zero until they are written.

    Args:
        kind: a copy in fp32, or the low halves of values whose high halves the shard holds.
        numel: elements of the shard.
        tier: where they live; their bytes are counted there.
        what: the name under which they are.

    Attributes:
        part: what is kept beside the shard, as long as it: fp32 or int16.
    """

    def __init__(self, kind: MasterWeights, numel: int, tier: Tier, what: str) -> None:
        self.tier = tier
        dtype = torch.int16 if kind == "split" else torch.float32
        self.part = _taken(numel, dtype, tier, what).zero_()

    def values(self, shard: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The fp32 values of ``start:stop`` of the shard: a view of the master itself, or joined from the halves."""
        stop = len(self.part) if stop is None else stop
        part = self.part[start:stop]
        return part if part.dtype == torch.float32 else join(shard[start:stop].to(part.device), part)

    def put(self, shard: Tensor, start: int, values: Tensor) -> None:
        """Stores ``values`` (fp32, 1-d) from element ``start`` on, and rounds them into the shard."""
        stop = start + len(values)
        part = self.part[start:stop]
        if part.dtype == torch.int16:
            low_half(values, part)
        elif part.data_ptr() != values.data_ptr():
            part.copy_(values)
        if shard.device == values.device:
            round_to_compute(values, shard[start:stop])
        else:
            rounded = torch.empty_like(values, dtype=shard.dtype)
            round_to_compute(values, rounded)
            shard[start:stop].copy_(rounded)

    def move(self, tier: Tier) -> None:
        """Goes to another tier.

        Raises:
            OutOfBudgetError: there is no room; nothing has moved.
        """
        if tier is self.tier:
            return
        self.part = _taken(self.part.numel(), self.part.dtype, tier, "master weights").copy_(self.part)
        self.tier.give(self.part.nbytes)
        self.tier = tier

    def release(self) -> None:
        """Gives the memory back."""
        self.tier.give(self.part.nbytes)


def _taken(numel: int, dtype: torch.dtype, tier: Tier, what: str) -> Tensor:
    tier.take(numel * dtype.itemsize, what)
    try:
        return tier.empty(numel, dtype, what)
    except BaseException:
        tier.give(numel * dtype.itemsize)
        raise
