"""Numbers of optimizer states as JSON."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gemini.core.errors import ConfigurationError

_PLAIN = (bool, int, float, str, type(None))


def is_scalar(value: object) -> bool:
    """Whether :func:`to_json` takes it: a tensor with one element and no dimensions, or what is no tensor."""
    return not isinstance(value, Tensor) or value.dim() == 0


def to_json(value: Any, name: str) -> Any:
    """A 0-d tensor, a plain value, or a list of plain values; ``name`` is for the error.

    Raises:
        ConfigurationError: it is something else.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return {"tensor": str(value.dtype).removeprefix("torch."), "value": value.item()}
    plain = isinstance(value, _PLAIN) or (isinstance(value, list) and all(isinstance(part, _PLAIN) for part in value))
    if not plain:
        raise ConfigurationError(
            f"{name} is a {type(value).__name__}, but sharded checkpoints hold tensors and numbers of optimizer states "
            "only. Use GeminiStrategy(state_dict_type='full')."
        )
    return value


def from_json(value: Any) -> Any:
    """The inverse of :func:`to_json`; every bit is the same, but for the payload of a NaN."""
    if isinstance(value, dict):
        return torch.tensor(value["value"], dtype=getattr(torch, value["tensor"]))
    return value
