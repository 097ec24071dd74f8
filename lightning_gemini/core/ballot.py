"""What the ranks tell each other before a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gemini.core.chunk_gradient import ChunkGradient, GradientState, square_sum
from lightning_gemini.core.failure import Failure, Failures
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.store import Store


class Ballot:
    """One all-reduce: which parameters have gradients, which gradients came late, and whatever else is to be agreed on.

    Every vote has the same form, whatever it is about: a rank whose step has failed takes part in the next one without
    knowing which of the others' it is.

    Args:
        store: the chunks.
        gradients: theirs.
        failures: ends the step on all ranks if it has failed on one.
        n_flags: how many more things :meth:`settle` agrees on.
    """

    def __init__(self, store: Store, gradients: Gradients, failures: Failures, n_flags: int) -> None:
        self._collectives = store.collectives
        self._device = store.device.device
        self._gradients = gradients
        self._failures = failures
        self._n_flags = n_flags

    def fail(self, failure: Failure) -> None:
        """Takes part in the next vote for a step that has failed on this rank; afterwards all ranks end it.

        Raises:
            Exception: what ends the step here.
        """
        self._vote((), [False] * self._n_flags, None, failure)

    def agree(self, chunks: Sequence[ChunkGradient]) -> None:
        """Makes ``used`` of ``chunks`` the same on all ranks and reduces late gradients; all ranks call.

        Raises:
            StepFailedError, PeerError: the step has failed on another rank.
        """
        if self._collectives.world_size > 1:
            self._vote(chunks, [False] * self._n_flags, None)

    def settle(
        self, chunks: Sequence[ChunkGradient], flags: Sequence[bool], totals: Sequence[Tensor] = ()
    ) -> tuple[bool, list[bool]]:
        """Does what :meth:`agree` does, and finds out whether the gradients are sound; waits for the device.

        Args:
            flags: more things to agree on, always as many.
            totals: sums of squares of other gradients, scalars on the device.

        Returns:
            whether the sums of squares of ``chunks``, and ``totals``, are finite on all ranks; and for each of
            ``flags`` whether any rank has set it.

        Raises:
            StepFailedError, PeerError: the step has failed on another rank.
        """
        unsound = self._unsound(chunks, totals)
        if self._collectives.world_size == 1:
            return not bool(unsound), list(flags)
        agreed, late, found = self._vote(chunks, flags, unsound)
        if late:
            found |= bool(self._collectives.sum(self._unsound(chunks, ()).float()))
        return not found, agreed

    def _vote(
        self,
        chunks: Sequence[ChunkGradient],
        flags: Sequence[bool],
        unsound: Tensor | None,
        failure: Failure | None = None,
    ) -> tuple[list[bool], bool, bool]:
        """The flags, whether any gradient was late, and whether any rank has found one ``unsound``."""
        if failure is None:
            self._failures.check()
        every = list(self._gradients.chunks.values())
        late = [gradient.state is GradientState.FILLING for gradient in every]
        marks = [float(mark) for group in (flags, late, *(g.used for g in every)) for mark in group]
        votes = torch.tensor([float(failure is not None), *marks, 0.0], device=self._device)
        if unsound is not None:
            votes[-1] = unsound
        failed, *agreed, found = self._collectives.sum(votes).bool().tolist()
        if failed:
            self._failures.end(failure)
        flags, rest = agreed[: len(flags)], agreed[len(flags) :]
        late_somewhere = dict(zip(every, rest[: len(every)], strict=True))
        used, start = {}, len(every)
        for gradient in every:
            used[gradient] = rest[start : start + len(gradient.used)]
            start += len(gradient.used)
        late_chunks = [gradient for gradient in chunks if late_somewhere[gradient]]
        self._gradients.reduce_late(late_chunks)
        for gradient in chunks:
            gradient.used = used[gradient]
        self._gradients.learn_order()
        return flags, bool(late_chunks), found

    def _unsound(self, chunks: Sequence[ChunkGradient], totals: Sequence[Tensor]) -> Tensor:
        """Whether a sum of squares of this rank's part is not finite; a scalar on the device."""
        sums = [*totals, *(square_sum(g).to(self._device) for g in chunks if g.shard is not None)]
        if not sums:
            return torch.zeros((), dtype=torch.bool, device=self._device)
        return ~torch.stack([total.double() for total in sums]).isfinite().all()
