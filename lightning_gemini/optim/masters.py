"""Master weights: fp32 values behind parameters of a lower precision.

A master is kept whole, or *split*: the bf16 parameter is its high half, rounded to nearest, and 16 more bits tell the
rest. Rounding is ``high = (bits + 0x8000) >> 16``; the low 16 bits, read as a signed number, are what rounding took
away, so ``(high << 16) + low`` gives back every bit.
"""

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


def low_half(master: Tensor, out: Tensor) -> Tensor:
    """Writes what :func:`round_to_compute` takes away from fp32 ``master`` to ``out`` (same shape, int16)."""
    # both shifts, so that the number fits: what a conversion does with one that does not is the device's affair
    return out.copy_((master.view(torch.int32) << _LOW_BITS) >> _LOW_BITS)


def join(high: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
    """The fp32 masters of bf16 ``high`` and int16 ``low``, bit for bit (of a NaN: a NaN), in ``out`` if given."""
    master = ((high.view(torch.int16).to(torch.int32) << _LOW_BITS) + low).view(torch.float32)
    return master if out is None else out.copy_(master)
