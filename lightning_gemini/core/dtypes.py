"""Which dtype parameters, masters and reductions have."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DtypePolicy:
    """The dtypes of one precision mode.

    Attributes:
        compute: the dtype of floating-point parameters, ``None`` to leave each as it is.
        master: whether an fp32 master weight is kept for parameters of a lower precision.
        reduce: the dtype in which gradients are reduced over the ranks, ``None`` for the parameter's own.
    """

    compute: torch.dtype | None = None
    master: bool = False
    reduce: torch.dtype | None = None

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a parameter of ``dtype`` is computed in."""
        return self.compute if self.compute is not None and dtype.is_floating_point else dtype

    def reduce_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the gradient of a parameter that is computed in ``dtype`` is reduced in."""
        return self.reduce if self.reduce is not None and dtype.is_floating_point else dtype

    def needs_master(self, dtype: torch.dtype) -> bool:
        """Whether a parameter that is computed in ``dtype`` has an fp32 master."""
        return self.master and dtype.is_floating_point and dtype.itemsize < 4
