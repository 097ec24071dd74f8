"""The factor that keeps fp16 gradients from underflowing."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch

_LARGEST = torch.finfo(torch.float32).max


class LossScale:
    """A loss scale that grows while gradients are finite and backs off when they are not.

    Source: Micikevicius et al., arXiv:1710.03740; the schedule and the state are those of ``torch.amp.GradScaler``.

    Args:
        initial_scale: the first value.
        growth_factor, growth_interval: it is multiplied by the one after as many steps without overflow as the other.
        backoff_factor: it is multiplied by this after an overflow.
        minimum: it goes no lower.

    Attributes:
        value: the scale.

    Raises:
        ValueError: a setting that makes no sense.
    """

    value: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int

    def __init__(
        self,
        initial_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        minimum: float = 1.0,
    ) -> None:
        _check("minimum", minimum, _is_number(minimum) and minimum > 0, "a finite number above 0")
        self.minimum = minimum
        self._set(initial_scale, growth_factor, backoff_factor, growth_interval)
        _check("initial_scale", initial_scale, initial_scale >= minimum, f"at least the minimum, {minimum}")
        self._good_steps = 0

    def update(self, overflow: bool) -> None:
        """Takes note of a step: whether its gradients had an infinity or a NaN anywhere."""
        if overflow:
            self.value = max(self.minimum, self.value * self.backoff_factor)
            self._good_steps = 0
            return
        self._good_steps += 1
        if self._good_steps >= self.growth_interval:
            grown = self.value * self.growth_factor
            self.value = grown if grown <= _LARGEST else self.value
            self._good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """In the format of ``torch.amp.GradScaler``."""
        return {
            "scale": self.value,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._good_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a :meth:`state_dict`, or a ``GradScaler``'s; a scale below the minimum is raised to it.

        Raises:
            ValueError: an entry is missing or makes no sense; nothing has changed then.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(f"the state of a loss scale lacks {', '.join(missing)}")
        self._set(state["scale"], state["growth_factor"], state["backoff_factor"], state["growth_interval"])
        self.value = max(self.value, self.minimum)
        self._good_steps = int(state["_growth_tracker"])

    def _set(self, scale: float, growth_factor: float, backoff_factor: float, growth_interval: int) -> None:
        _check("initial_scale", scale, _is_number(scale) and 0 < scale <= _LARGEST, "a number above 0, in fp32's range")
        _check("growth_factor", growth_factor, _is_number(growth_factor) and growth_factor > 1, "a number above 1")
        _check(
            "backoff_factor", backoff_factor, _is_number(backoff_factor) and 0 < backoff_factor < 1, "between 0 and 1"
        )
        whole = _is_number(growth_interval) and growth_interval == int(growth_interval)
        _check("growth_interval", growth_interval, whole and growth_interval >= 1, "a whole number, at least 1")
        self.value = float(scale)
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _check(name: str, value: float, fine: bool, expected: str) -> None:
    if not fine:
        raise ValueError(f"{name} is {value!r}; it must be {expected}")
