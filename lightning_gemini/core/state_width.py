"""How much state an optimizer will keep for each element, known before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from lightning_gemini.core.blocks import in_blocks, state_bytes
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.layout import ChunkSpec
from lightning_gemini.optim.recognise import recognise

#: What a rule's arithmetic, which is in fp32, can read and write.
RULED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StateWidths:
    """Bytes of optimizer state for each element of a chunk.

    Attributes:
        optimizers: in the order of the layout.
        policy: the dtypes.
        tried: by the optimizers' numbers and by group, the elements of state for each element of a parameter.
    """

    optimizers: Sequence[Optimizer]
    policy: DtypePolicy
    tried: Mapping[int, Sequence[float]]

    def of(self, spec: ChunkSpec) -> float:
        """Bytes for each element of a chunk; 0 where no optimizer has it."""
        number, group, dtype = spec.kind.optimizer, spec.kind.group or 0, spec.kind.dtype
        if number is None:
            return 0.0
        optimizer = self.optimizers[number]
        if self.ruled(spec):
            rule = recognise(optimizer, optimizer.param_groups[group])
            assert rule is not None
            return len(rule.state_names) * self.policy.state.itemsize
        if in_blocks(optimizer):
            return state_bytes(optimizer)
        seen = 4 if self.policy.needs_master(dtype) else dtype.itemsize
        return seen * self.tried[number][group]

    def ruled(self, spec: ChunkSpec) -> bool:
        """Whether a rule updates the chunk."""
        number, group, dtype = spec.kind.optimizer, spec.kind.group or 0, spec.kind.dtype
        if number is None or dtype not in RULED or (dtype == torch.float16 and not self.policy.needs_master(dtype)):
            return False
        return recognise(self.optimizers[number], self.optimizers[number].param_groups[group]) is not None
