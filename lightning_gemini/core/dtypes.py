"""Which dtype parameters, masters, reductions and optimizer states have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_gemini.core.errors import ConfigurationError

#: How fp32 values behind parameters of a lower precision are kept: "fp32" beside them, 4 bytes each; "split" as the low
#: halves of values whose high halves the bf16 parameters are, 2 bytes each. Both give the same bits in every run.
MasterWeights = Literal["split", "fp32"]


@dataclass(frozen=True)
class DtypePolicy:
    """The dtypes of one precision mode.

    Attributes:
        compute: the dtype of floating-point parameters, ``None`` to leave each as it is.
        master: how an fp32 master weight is kept for parameters of a lower precision, ``None`` for not at all.
        reduce: the dtype in which gradients are reduced over the ranks, ``None`` for the parameter's own.
        state: the dtype of optimizer states, fp32 or bf16 (stochastically rounded).

    Raises:
        ConfigurationError: these do not go together.
    """

    compute: torch.dtype | None = None
    master: MasterWeights | None = None
    reduce: torch.dtype | None = None
    state: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.master not in (None, "split", "fp32"):
            raise ConfigurationError(f"master_weights must be 'split' or 'fp32', got {self.master!r}.")
        if self.master == "split" and self.compute != torch.bfloat16:
            raise ConfigurationError(
                f"master_weights='split' keeps the low half of an fp32 value whose high half is a bf16 parameter, but "
                f"parameters are computed in {self.compute}. Use master_weights='fp32'."
            )
        if self.state not in (torch.float32, torch.bfloat16):
            raise ConfigurationError(f"optimizer states can be in fp32 or bf16, got {self.state}.")

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a parameter of ``dtype`` is computed in."""
        return self.compute if self.compute is not None and dtype.is_floating_point else dtype

    def reduce_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the gradient of a parameter that is computed in ``dtype`` is reduced in."""
        return self.reduce if self.reduce is not None and dtype.is_floating_point else dtype

    def needs_master(self, dtype: torch.dtype) -> bool:
        """Whether a parameter that is computed in ``dtype`` has an fp32 master."""
        return self.master is not None and dtype.is_floating_point and dtype.itemsize < 4

    def master_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the master behind each element that is computed in ``dtype``."""
        return (2 if self.master == "split" else 4) if self.needs_master(dtype) else 0
