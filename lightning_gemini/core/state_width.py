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
from lightning_gemini.optim.rule import Rule

#: What a rule's arithmetic, which is in fp32, can read and write.
_RULED = (torch.float32, torch.bfloat16, torch.float16)


def suits_rules(dtype: torch.dtype, policy: DtypePolicy) -> bool:
    """Whether rules can update parameters of ``dtype``; fp16 only behind masters."""
    return dtype in _RULED and (dtype != torch.float16 or policy.needs_master(dtype))


def rule_for(optimizer: Optimizer, spec: ChunkSpec, policy: DtypePolicy) -> Rule | None:
    """The rule that does to a chunk of ``optimizer`` what the optimizer does; ``None`` if it has to do it itself."""
    if not suits_rules(spec.kind.dtype, policy):
        return None
    return recognise(optimizer, optimizer.param_groups[spec.kind.group or 0])


@dataclass(frozen=True)
class StateWidths:
    """Bytes of optimizer state for each element of a chunk.

    Attributes:
        optimizers: in the order of the layout.
        tried: by the optimizers' numbers and by group, the elements of state for each element of a parameter.
    """

    optimizers: Sequence[Optimizer]
    tried: Mapping[int, Sequence[float]]

    def of(self, spec: ChunkSpec, policy: DtypePolicy) -> float:
        """Bytes for each element of a chunk; 0 where no optimizer has it."""
        number, dtype = spec.kind.optimizer, spec.kind.dtype
        if number is None:
            return 0.0
        if (rule := self.rule(spec, policy)) is not None:
            return len(rule.state_names) * policy.state.itemsize
        if in_blocks(self.optimizers[number]):
            return state_bytes(self.optimizers[number])
        seen = 4 if policy.needs_master(dtype) else dtype.itemsize
        return seen * self.tried[number][spec.kind.group or 0]

    def rule(self, spec: ChunkSpec, policy: DtypePolicy) -> Rule | None:
        """The rule that updates the chunk, if there is one."""
        number = spec.kind.optimizer
        return None if number is None else rule_for(self.optimizers[number], spec, policy)
