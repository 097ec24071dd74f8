"""Medians of paired samples, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RESAMPLES = 5000


@dataclass(frozen=True)
class Estimate:
    """A median and its 95% bootstrap confidence interval."""

    median: float
    low: float
    high: float

    def format(self, pattern: str = "{:.2f}") -> str:
        """``median [low, high]``, each number by ``pattern``."""
        low, high = pattern.format(self.low), pattern.format(self.high)
        return f"{pattern.format(self.median)} [{low}, {high}]"


def median(samples: Sequence[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    return float(_medians(torch.tensor(samples, dtype=torch.float64)))


def estimate(samples: Sequence[float], seed: int = 0) -> Estimate:
    """The median of independent samples; the interval by the percentile bootstrap, the same for the same seed."""
    values = torch.tensor(samples, dtype=torch.float64)
    if not values.numel():
        raise ValueError("an estimate needs at least one sample")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(values.numel(), (_RESAMPLES, values.numel()), generator=generator)
    low, high = torch.quantile(_medians(values[draws]), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(_medians(values)), low, high)


def ratio(samples: Sequence[float], reference: Sequence[float]) -> Estimate:
    """How many times as long as ``reference``: the pairs' quotients, so that what slows a whole round cancels."""
    return estimate([a / b for a, b in zip(samples, reference, strict=True)])


def difference(samples: Sequence[float], reference: Sequence[float], scale: float = 1.0) -> Estimate:
    """How much longer than ``reference``, times ``scale``."""
    return estimate([(a - b) * scale for a, b in zip(samples, reference, strict=True)])


def _medians(values: Tensor) -> Tensor:
    return torch.quantile(values, 0.5, dim=-1)
