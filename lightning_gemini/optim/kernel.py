"""Which kernel runs the rules where."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from lightning_gemini.optim.native import NativeKernel, UnavailableError
from lightning_gemini.optim.operands import Operands
from lightning_gemini.optim.rule import Rule
from lightning_gemini.optim.tensor_kernel import TensorKernel

__all__ = ["CHOICES", "VARIABLE", "Kernel", "UnavailableError", "kernel_for"]

#: Forces a kernel.
VARIABLE = "LIGHTNING_GEMINI_KERNEL"
CHOICES = ("native", "compiled", "eager")


class Kernel(Protocol):
    """Runs rules over operands, in place."""

    @property
    def name(self) -> str: ...

    def prepare(self, rule: Rule) -> bool:
        """Makes what running ``rule`` needs, before training; whether that is there."""

    def update(self, rule: Rule, scalars: Sequence[float], operands: Operands) -> None:
        """One step of ``rule`` with its ``scalars``."""

    def square_sum(self, values: Tensor) -> Tensor:
        """The sum of squares of 1-d fp32, bf16 or fp16 ``values``: 0-d, fp64, on their device, accumulated in fp64 on
        the CPU."""


def kernel_for(device: torch.device) -> Kernel:
    """The fastest kernel that runs on ``device``: native on the CPU, compiled elsewhere; eager where that cannot be.

    The variable ``LIGHTNING_GEMINI_KERNEL`` forces ``native`` (which concerns the CPU alone), ``compiled`` or
    ``eager``. A kernel that has to be replaced by a slower one warns, once.

    Raises:
        ValueError: the variable holds another word.
        UnavailableError: ``native`` is forced and cannot be built.
    """
    forced = os.environ.get(VARIABLE)
    if forced is not None and forced not in CHOICES:
        raise ValueError(f"{VARIABLE} is {forced!r}; it must be one of {', '.join(CHOICES)}")
    if device.type == "cpu" and forced in (None, "native"):
        return _native() if forced is None else NativeKernel()
    return _tensor_kernel(compiled=forced != "eager")


@cache
def _native() -> Kernel:
    try:
        return NativeKernel()
    except UnavailableError as error:
        warnings.warn(
            "the optimizer runs operation by operation on the CPU, several times slower than compiled: install g++ or "
            f"clang++, or name a C++17 compiler in CXX. {error}",
            stacklevel=5,
        )
        return _tensor_kernel(compiled=False)


@cache
def _tensor_kernel(compiled: bool) -> Kernel:
    return TensorKernel(compiled)
