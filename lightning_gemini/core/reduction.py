"""Reductions of chunks' gradients that are under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.collectives import Collectives, Pending
from lightning_gemini.core.memory import BufferPool


@dataclass(frozen=True, eq=False)
class Reduction:
    """A reduction under way; ``marks`` says which parameters have a gradient, if that cannot wait for the step."""

    gradient: ChunkGradient
    pending: Pending
    out: Tensor
    scratch: Tensor | None
    marks: tuple[Tensor, Pending] | None


class ReducedNothing:
    """What a rank without gradients has to do with the reductions of the others: it sends zeros and looks at nothing.

    So one set of buffers for each dtype serves all of them, and all are started at once: no rank waits for this one.

    Args:
        sizes: elements and dtype of each reduction that is left, in the agreed order.
        collectives: of the ranks.
        pool: where the buffers come from.
        under_way: reductions that have been started before.

    Raises:
        OutOfBudgetError: there is no memory for the buffers.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, torch.dtype]],
        collectives: Collectives,
        pool: BufferPool,
        under_way: Sequence[Pending],
    ) -> None:
        self._pool = pool
        self._pending = list(under_way)
        self._buffers: list[Tensor] = []
        sets: dict[torch.dtype, list[Tensor]] = {}
        most = max((numel for numel, _ in sizes), default=0)
        for dtype in dict.fromkeys(dtype for _, dtype in sizes):
            parts = (most, most // collectives.world_size, collectives.scratch_numel(most))
            sets[dtype] = [pool.get(numel, dtype, "a step that has failed") for numel in parts]
            sets[dtype][0].zero_()
            self._buffers += sets[dtype]
        for numel, dtype in sizes:
            full, out, scratch = sets[dtype]
            out, scratch = out[: numel // collectives.world_size], scratch[: collectives.scratch_numel(numel)]
            self._pending.append(collectives.reduce_scatter(full[:numel], out, scratch, "zeros"))

    def wait(self) -> None:
        """Waits until the other ranks have made all these reductions."""
        for pending in self._pending:
            pending.wait()
        for buffer in self._buffers:
            self._pool.put(buffer)
