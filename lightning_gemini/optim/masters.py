"""Master weights: fp32 values behind parameters of a lower precision."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUND = 0x8000
_LOW_BITS = 16


def round_to_compute(master: Tensor, out: Tensor) -> Tensor:
    """Writes fp32 ``master`` to ``out`` (same shape, bf16 or fp16) and returns ``out``.

    To bf16 it rounds to nearest, ties away from zero: unlike ties to even, that can be undone from the low 16 bits
    alone, which the split representation of masters relies on.
    """
    if out.dtype != torch.bfloat16:
        return out.copy_(master)
    bits = (master.view(torch.int32) + _ROUND) >> _LOW_BITS
    # a NaN with a low payload would otherwise round to infinity or to a finite number
    bits = torch.where(master.isnan(), 0x7FC0, bits)
    out.view(torch.int16).copy_(bits)
    return out
