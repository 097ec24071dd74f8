"""Whether an update may be made: all ranks make it, all skip it, or all fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_gemini.core.ballot import Ballot
from lightning_gemini.core.buffers import Buffers
from lightning_gemini.core.chunk_gradient import ChunkGradient, square_sum
from lightning_gemini.core.errors import DisagreementError, GeminiError, NonFiniteError, UpdateError
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.placement import Placement
from lightning_gemini.core.store import Store
from lightning_gemini.core.update_policy import UpdatePolicy
from lightning_gemini.optim.loss_scale import LossScale

#: What the ranks agree on before an update, beside gradients and buffers.
N_FLAGS = 4


class Verdict:
    """Decides about each update, the same on all ranks.

    Args:
        store: the chunks.
        gradients: theirs.
        ballot: how the ranks agree.
        buffers: the model's; those that have changed are brought to all ranks.
        suspect: called when any rank has failed.
        placement: plans anew if steps have grown, or memory has run out, on any rank.
        policy: what becomes of steps with gradients that are not finite.
    """

    def __init__(
        self,
        store: Store,
        gradients: Gradients,
        ballot: Ballot,
        buffers: Buffers,
        suspect: Callable[[], None],
        placement: Placement,
        policy: UpdatePolicy,
    ) -> None:
        self._store = store
        self._gradients = gradients
        self._ballot = ballot
        self._buffers = buffers
        self._suspect = suspect
        self._placement = placement
        self._policy = policy
        self._used: list[Tensor] = []

    def note_use(self, gradient: ChunkGradient) -> None:
        """``gradient`` is about to be used within its backward: whether it was finite is found out at the step."""
        self._used.append(square_sum(gradient).to(self._store.device.device))

    def may_update(self, chunks: list[ChunkGradient], inspect: Callable[[], None]) -> bool:
        """Whether the update of ``chunks`` is to be made; if not, the step is skipped and their gradients are gone.

        Args:
            inspect: raises GeminiError if this rank cannot make the update.

        Raises:
            GeminiError: this rank cannot make it; nothing has changed.
            DisagreementError: another rank cannot.
            UpdateError: an update has failed in the background, on this rank or another one.
            NonFiniteError: gradients are not finite, and that is not to be skipped.
            StepFailedError, PeerError: the step has failed on another rank.
        """
        sound = self._vote(chunks, inspect)
        broken = None if sound else self._first_broken(chunks)
        scales = [gradient.tried_scale for gradient in chunks if any(gradient.used)]
        scale = self._policy.loss_scale
        if broken is None:
            if scale is not None and scales:
                scale.update(overflow=False)
            return True
        self._gradients.discard(chunks)
        self._store.counters.skipped += 1
        if scale is not None:
            self._lower(scale, max(scales, default=scale.value), broken)
        elif self._policy.nonfinite == "skip":
            warnings.warn(f"the gradient of {broken} is not finite: the step is skipped on all ranks", stacklevel=2)
        else:
            raise NonFiniteError(
                f"the gradient of {broken} is not finite (the first one, in the order of the model). No rank takes the "
                "step, and the weights are unchanged. Lower the learning rate or clip gradients if training diverges; "
                "GeminiPrecision(nonfinite='skip') skips such steps."
            )
        return False

    def _vote(self, chunks: list[ChunkGradient], inspect: Callable[[], None]) -> bool:
        """Has all ranks agree that none has failed, and brings them the buffers; whether gradients are sound."""
        failure: GeminiError | None = None
        try:
            inspect()
        except GeminiError as error:
            failure = error
        used, self._used = self._used, []
        flags = [failure is not None, isinstance(failure, UpdateError), *self._placement.complaints()]
        sound, agreed = self._ballot.settle(chunks, [*flags, *self._buffers.changed()], used)
        failed, torn, grown, short, *changed = agreed
        self._placement.heed(grown, short)
        if failed:
            self._gradients.discard(chunks)  # they may be what was wrong
            self._suspect()
        if failure is not None:
            raise failure
        if torn:
            raise UpdateError(
                "an update has failed in the background of another rank, whose error says why: the weights are not "
                "those of any step. Go on from the last checkpoint."
            )
        if failed:
            raise DisagreementError("another rank could not take this step; no rank did, and the weights are unchanged")
        if any(changed):
            self._buffers.sync(changed)
        if not sound and used:
            raise NonFiniteError(
                "a gradient is not finite, and with update='in_backward' it has been used already: weights and "
                "optimizer states hold NaN. Go on from the last checkpoint, with update='at_step' if it happens again."
            )
        return sound

    def _lower(self, scale: LossScale, tried: float, name: str) -> None:
        """Lowers the loss scale, because the gradient of ``name`` overflowed at ``tried``, unless that has happened."""
        if tried <= scale.minimum:
            raise NonFiniteError(
                f"the gradient of {name} is not finite even with a loss scale of {tried}, the lowest there may be. The "
                "weights are unchanged. Training diverges, or the model leaves the range of fp16 by itself: a lower "
                "learning rate may help, or precision='bf16-mixed'."
            )
        if tried >= scale.value:  # else another optimizer's step has done it, for the same backward
            scale.update(overflow=True)

    def _first_broken(self, chunks: Sequence[ChunkGradient]) -> str | None:
        """The first parameter on any rank whose gradient is not finite; ``None`` if it is the sum of squares alone."""
        broken = [
            place.param
            for gradient in chunks
            for place, span in zip(gradient.chunk.spec.slots, gradient.spans, strict=True)
            if gradient.shard is not None and not gradient.shard[span.start : span.stop].isfinite().all()
        ]
        every = [p for p in self._store.collectives.gather_objects(min(broken, default=None)) if p is not None]
        return self._store.layout.params[min(every)].name if every else None
