"""What the ranks tell each other before a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gemini.core.chunk_gradient import ChunkGradient, GradientState, square_sum
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.store import Store


class Ballot:
    """One all-reduce: which parameters have gradients, which gradients came late, and whatever else is to be agreed on.

    Args:
        store: the chunks.
        gradients: theirs.
    """

    def __init__(self, store: Store, gradients: Gradients) -> None:
        self._collectives = store.collectives
        self._device = store.device.device
        self._gradients = gradients

    def agree(self, chunks: Sequence[ChunkGradient]) -> None:
        """Makes ``used`` of ``chunks`` the same on all ranks and reduces late gradients; all ranks call."""
        if self._collectives.world_size > 1:
            self._vote(chunks, (), None)

    def settle(
        self, chunks: Sequence[ChunkGradient], flags: Sequence[bool], totals: Sequence[Tensor] = ()
    ) -> tuple[bool, list[bool]]:
        """Does what :meth:`agree` does, and finds out whether the gradients are sound; waits for the device.

        Args:
            flags: more things to agree on.
            totals: sums of squares of other gradients, scalars on the device.

        Returns:
            whether the sums of squares of ``chunks``, and ``totals``, are finite on all ranks; and for each of
            ``flags`` whether any rank has set it.
        """
        unsound = self._unsound(chunks, totals)
        if self._collectives.world_size == 1:
            return not bool(unsound), list(flags)
        agreed, late, found = self._vote(chunks, flags, unsound)
        if late:
            found |= bool(self._collectives.sum(self._unsound(chunks, ()).float()))
        return not found, agreed

    def _vote(
        self, chunks: Sequence[ChunkGradient], flags: Sequence[bool], unsound: Tensor | None
    ) -> tuple[list[bool], bool, bool]:
        """The flags, whether any gradient was late, and whether any rank has found one ``unsound``."""
        late = [gradient.state is GradientState.FILLING for gradient in chunks]
        marks = [float(mark) for group in (flags, late, *(g.used for g in chunks)) for mark in group]
        votes = torch.tensor([*marks, 0.0], device=self._device)
        if unsound is not None:
            votes[-1] = unsound
        *agreed, found = self._collectives.sum(votes).bool().tolist()
        flags, rest = agreed[: len(flags)], agreed[len(flags) :]
        somewhere, used = rest[: len(late)], rest[len(late) :]
        self._gradients.reduce_late([gradient for gradient, mark in zip(chunks, somewhere, strict=True) if mark])
        start = 0
        for gradient in chunks:
            gradient.used = used[start : start + len(gradient.used)]
            start += len(gradient.used)
        self._gradients.learn_order()
        return flags, any(somewhere), found

    def _unsound(self, chunks: Sequence[ChunkGradient], totals: Sequence[Tensor]) -> Tensor:
        """Whether a sum of squares of this rank's part is not finite; a scalar on the device."""
        sums = [*totals, *(square_sum(g).to(self._device) for g in chunks if g.shard is not None)]
        if not sums:
            return torch.zeros((), dtype=torch.bool, device=self._device)
        return ~torch.stack([total.double() for total in sums]).isfinite().all()
