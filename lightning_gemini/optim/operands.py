"""What a kernel updates: the tensors of one run of elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MASTERS = {
    torch.float32: (None,),
    torch.bfloat16: (None, torch.float32, torch.int16),
    torch.float16: (None, torch.float32),
}


@dataclass(frozen=True)
class Operands:
    """A run of elements; 1-d contiguous tensors of one length, on one device.

    Attributes:
        shard: fp32, bf16 or fp16; receives the parameter.
        master: the fp32 values; or int16, the low halves of a bf16 shard (see ``masters.py``); or None: the shard
            itself is the value, computed in fp32 and rounded to nearest, ties to even.
        grad: fp32, bf16 or fp16.
        states: in the order of the rule's names; fp32, or bf16, which is rounded stochastically.
        factor: what the gradient is multiplied by, in fp32: the inverse of a loss scale, a clipping coefficient. A
            0-d fp32 tensor on the operands' device is not waited for.
        limit: then the gradient is clamped to [-limit, limit]; a NaN stays. A 0-d tensor is like that of ``factor``.
        seed: of the stochastic rounding; a new one for each step and chunk.
        first: the position of the first element in its chunk, so that the noise does not depend on how it is cut.

    Raises:
        ValueError: a length, dtype, device or layout that no kernel takes.
    """

    shard: Tensor
    grad: Tensor
    master: Tensor | None = None
    states: Sequence[Tensor] = ()
    factor: float | Tensor = 1.0
    limit: float | Tensor = inf
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        for name, tensor in self._named():
            if tensor.shape != self.shard.shape or tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; operands are contiguous, "
                    f"1-d and as long as the shard, {tuple(self.shard.shape)}"
                )
            if tensor.device != self.shard.device:
                raise ValueError(f"{name} is on {tensor.device}, the shard on {self.shard.device}")
        master = None if self.master is None else self.master.dtype
        if master not in _MASTERS.get(self.shard.dtype, ()):
            raise ValueError(f"a {self.shard.dtype} shard cannot have a master of {master}")
        if self.grad.dtype not in _FLOATS:
            raise ValueError(f"a gradient cannot be {self.grad.dtype}")
        states = {state.dtype for state in self.states}
        if len(states) > 1 or not states <= {torch.float32, torch.bfloat16}:
            raise ValueError(f"states must be all fp32 or all bf16, not {states}")

    def block(self, start: int, stop: int) -> Operands:
        """The elements from ``start`` to ``stop``, as views."""
        return Operands(
            self.shard[start:stop],
            self.grad[start:stop],
            None if self.master is None else self.master[start:stop],
            [state[start:stop] for state in self.states],
            self.factor,
            self.limit,
            self.seed,
            self.first + start,
        )

    def _named(self) -> list[tuple[str, Tensor]]:
        named = [("shard", self.shard), ("grad", self.grad)]
        if self.master is not None:
            named.append(("master", self.master))
        return named + [("state", state) for state in self.states]
