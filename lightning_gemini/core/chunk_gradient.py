"""The gradient of one chunk, and its states."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

from lightning_gemini.core.chunk import Chunk
from lightning_gemini.core.errors import StateError
from lightning_gemini.optim.kernel import kernel_for


class GradientState(IntEnum):
    """Where a chunk's gradient is in the present backward, and what that costs beside the reduced shard."""

    EMPTY = 0  #: nothing has come: no memory
    FILLING = 1  #: some parameters' gradients are in: a buffer as long as the chunk
    READY = 2  #: all are in, it waits for its turn: the same buffer
    REDUCING = 3  #: the collective runs: the same buffer, and the shard to come


_TRANSITIONS = {
    (GradientState.EMPTY, GradientState.FILLING),
    (GradientState.FILLING, GradientState.READY),
    (GradientState.READY, GradientState.REDUCING),
    (GradientState.REDUCING, GradientState.EMPTY),
    (GradientState.FILLING, GradientState.EMPTY),  # dropped, as are the next two after a failure
    (GradientState.READY, GradientState.EMPTY),
}


class ChunkGradient:
    """The gradient of one chunk.

    What scales it, the loss scale and clipping, is not done to the shard but noted: the update, which reads every
    element anyway, multiplies by :attr:`factor` and clamps to :attr:`limit`.

    Attributes:
        spans: for each slot the part of the shard that holds it, empty where another rank does.
        landing: waits for a part of the shard that is on its way to host memory, and adds it; ``None`` without one.
        loss_scale: what the shard still has to be divided by.
        tried_scale: the largest loss scale that a part of it came with.
        clip: an fp32 scalar where the shard is, or ``None``.
        limit: the largest absolute value of a scaled element; a number, or an fp32 scalar where the shard is.
        square_sum: of the shard as it is, if it is known: a scalar, on the device or where the shard is.
        used: for each slot, whether a gradient has come since the last step (on any rank, once the ranks have agreed).
    """

    def __init__(self, chunk: Chunk, spans: list[range]) -> None:
        self.chunk = chunk
        self.spans = spans
        self._shard: Tensor | None = None
        self.landing: Callable[[], None] | None = None
        self.loss_scale = self.tried_scale = 1.0
        self.clip: Tensor | None = None
        self.limit: float | Tensor = math.inf
        self.square_sum: Tensor | None = None
        self.used = [False] * len(chunk.params)
        self.state = GradientState.EMPTY
        self.buffer: Tensor | None = None
        self.reduced = False  # in this backward
        self._arrived = [False] * len(chunk.params)
        self._arrivals = [0] * len(chunk.params)
        self._expected = [1] * len(chunk.params)
        self._missing = len(chunk.params)
        ends = [0, *(slot.end for slot in chunk.spec.slots)]
        starts = [*(slot.offset for slot in chunk.spec.slots), chunk.spec.numel]
        self._gaps = [(a, b) for a, b in zip(ends, starts, strict=True) if a < b]

    @property
    def shard(self) -> Tensor | None:
        """The reduced mean of this rank's part, summed over the backwards since the last step; ``None`` before the
        first. In the compute dtype after one backward, in fp32 while accumulating. Still to be scaled.

        Waits for what is on its way to host memory.
        """
        if self.landing is not None:
            self.landing()
        return self._shard

    @shard.setter
    def shard(self, shard: Tensor | None) -> None:
        self._shard = shard

    def hand_over(self) -> Tensor:
        """The shard, to somebody who gives it back to where it came from."""
        shard, self.shard = self.shard, None
        assert shard is not None
        return shard

    @property
    def wanted(self) -> bool:
        """Whether any parameter is to have a gradient."""
        return any(param.requires_grad for param in self.chunk.params)

    def move(self, state: GradientState) -> None:
        if (self.state, state) not in _TRANSITIONS:
            raise StateError(
                f"the gradient of chunk {self.chunk.index} cannot go from {self.state.name} to {state.name}"
            )
        self.state = state

    def open(self, buffer: Tensor) -> None:
        """EMPTY -> FILLING."""
        self.move(GradientState.FILLING)
        for start, stop in self._gaps:
            buffer[start:stop].zero_()
        self.buffer = buffer
        self._arrived = [False] * len(self._arrivals)

    def fill(self, slot: int, grad: Tensor) -> bool:
        """Copies one parameter's gradient in, or adds it to what came before; returns whether it was the last."""
        assert self.buffer is not None
        view = self.chunk.view_in(self.buffer, slot)
        if self._arrived[slot]:
            view.add_(grad)
        else:
            view.copy_(grad)
            self._arrived[slot] = True
        self.used[slot] = True
        self._arrivals[slot] += 1
        if self._arrivals[slot] == self._expected[slot]:
            self._missing -= 1
        return self._missing == 0

    def drop(self, slot: int) -> None:
        """Forgets the gradient of one parameter, reduced or not."""
        self.zero(slot)
        self.used[slot] = False

    def zero(self, slot: int) -> None:
        """Makes the gradient of one parameter zero, reduced or not."""
        self._arrived[slot] = False
        self.square_sum = None
        if self.shard is not None:
            self.shard[self.spans[slot].start : self.spans[slot].stop].zero_()

    @property
    def factor(self) -> Tensor | float:
        """What the shard has to be multiplied with."""
        return 1 / self.loss_scale if self.clip is None else self.clip / self.loss_scale

    @property
    def clamped(self) -> bool:
        """Whether there is a limit."""
        return isinstance(self.limit, Tensor) or self.limit < math.inf

    def scaled(self, start: int = 0, stop: int | None = None) -> Tensor:
        """``start:stop`` of the shard with everything done to it that is to be done; at least fp32 if there is any."""
        assert self.shard is not None
        part = self.shard[start:stop]
        if self.clip is None and self.loss_scale == 1 and not self.clamped:
            return part
        part = part.to(torch.promote_types(part.dtype, torch.float32)) * self.factor
        if not self.clamped:
            return part
        limit = torch.as_tensor(self.limit, dtype=part.dtype, device=part.device)
        return part.clamp_(-limit, limit)

    def scale(self) -> None:
        """Does it to the shard itself, of which the sum of squares is known."""
        assert self.shard is not None
        assert self.square_sum is not None
        # a limit would hide an infinity that nobody has looked for
        sound = self.square_sum.to(self.shard.device).isfinite()
        self.shard.copy_(torch.where(sound, self.scaled(), math.nan))
        self.forget_scaling()

    def forget_scaling(self) -> None:
        """The shard is new, or gone."""
        self.loss_scale, self.clip, self.limit, self.square_sum = 1.0, None, math.inf, None

    def bring_scaling(self, device: torch.device) -> None:
        """The shard is on another device now: what scales it goes there."""
        self.clip = self.clip if self.clip is None else self.clip.to(device)
        self.limit = self.limit.to(device) if isinstance(self.limit, Tensor) else self.limit

    def clip_by(self, factor: Tensor) -> None:
        """Scales the gradient by ``factor`` (an fp32 scalar where the shard is)."""
        if self.clamped:
            self.limit = self.limit * factor
        self.clip = factor if self.clip is None else self.clip * factor

    def clamp(self, limit: float) -> None:
        """Clamps each element of the gradient to ``[-limit, limit]``."""
        self.limit = self.limit.clamp(max=limit) if isinstance(self.limit, Tensor) else min(self.limit, limit)

    def complete(self) -> None:
        """FILLING -> READY; parameters without a gradient get zeros."""
        assert self.buffer is not None
        for slot, arrived in enumerate(self._arrived):
            if not arrived:
                self.chunk.view_in(self.buffer, slot).zero_()
        self.move(GradientState.READY)

    def end_backward(self) -> None:
        """Learns how many parts each gradient came in, and starts to count anew."""
        for slot, arrivals in enumerate(self._arrivals):
            self._expected[slot] = max(self._expected[slot], arrivals)
            self._arrivals[slot] = 0
        self._missing = len(self._arrivals)
        self.reduced = False


def square_sum(gradient: ChunkGradient) -> Tensor:
    """The sum of the squares of a gradient's shard, which it must have, as it is: a scalar.

    It is on the device if it was taken there, else where the shard is.
    """
    if gradient.square_sum is None:
        assert gradient.shard is not None
        gradient.square_sum = square_sum_of(gradient.shard)
    return gradient.square_sum


def square_sum_of(shard: Tensor) -> Tensor:
    """The sum of the squares of a shard; a scalar where it is."""
    if shard.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return kernel_for(shard.device).square_sum(shard)
    norm: Tensor = torch.linalg.vector_norm(shard)
    return norm.square()
