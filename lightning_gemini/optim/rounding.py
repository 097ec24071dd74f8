"""Stochastic rounding to bf16, with noise that is a function of place and seed: the same bits from every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFF
_NAN = 0x7FC0


def signed(bits: int) -> int:
    """The low 32 bits of an integer, read as a signed one."""
    return (bits + 2**31) % 2**32 - 2**31


def counter(seed: int, first: int) -> int:
    """What element ``first`` hashes, a signed 32-bit integer; the elements after it count on from there.

    Of the seed the low 32 bits matter. The golden ratio puts the streams of neighbouring seeds far from each other.
    """
    return signed(seed * 0x9E3779B9 + first)


def hash_bits(x: Tensor) -> Tensor:
    """32 well mixed bits for each int32; "lowbias32" of C. Wellons' hash-prospector."""
    x = (x ^ ((x >> 16) & _LOW)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * signed(0x846CA68B)
    return x ^ ((x >> 16) & _LOW)


def noises(counters: Tensor, count: int) -> list[Tensor]:
    """For each of ``count`` states (up to three) int32 noise, uniform in its low 16 bits.

    One hash serves two states; the third hashes it again.
    """
    if not count:
        return []
    bits = hash_bits(counters)
    return [bits, bits >> 16, *([hash_bits(bits)] if count > 2 else [])][:count]


def round_randomly(values: Tensor, noise: Tensor) -> Tensor:
    """Fp32 ``values`` in bf16: up with the probability of the part that is cut off, so that the mean is right.

    What bf16 holds stays as it is, infinities too; a NaN stays a NaN.
    """
    bits = values.view(torch.int32)
    bits = (bits + torch.where(values.isfinite(), noise & _LOW, 0)) >> 16
    return torch.where(values.isnan(), _NAN, bits).to(torch.int16).view(torch.bfloat16)
