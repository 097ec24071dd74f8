"""Whether an optimizer works on flat shards: tried, not looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gemini.core.blocks import in_blocks, scales_by_norm
from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.trial import try_on_pieces

#: Why the well-known ones cannot work; others are refused with what the trial showed.
_REASONS = {
    "LBFGS": "it evaluates the loss several times in one step and keeps a history of whole gradients",
    "Muon": "it orthogonalises whole matrices",
    "Adafactor": "it factors the second moment of whole matrices into rows and columns",
    "LAMB": "it scales the update of each parameter by that parameter's norm",
    "Lamb": "it scales the update of each parameter by that parameter's norm",
    "LARS": "it scales the update of each parameter by that parameter's norm",
    "Shampoo": "it preconditions with statistics of whole matrices",
    "SOAP": "it preconditions with statistics of whole matrices",
    "AdaFactor": "it factors the second moment of whole matrices into rows and columns",
    "ScalableShampoo": "it preconditions with statistics of whole matrices",
    "Prodigy": "it finds one learning rate from all parameters together",
    "SparseAdam": "it wants sparse gradients, and chunks hold dense ones",
}


def require_elementwise(optimizer: Optimizer, name: str, device: torch.device) -> list[float]:
    """Runs the optimizer's rule on a matrix and on the same numbers in two flat pieces, one by one, and compares.

    Groups that differ in their learning rates only are tried once.

    Returns:
        for each group the elements of state that each element of a parameter gets.

    Raises:
        ConfigurationError: they differ, so shards would be updated wrongly; ``name`` says which optimizer it is.
    """
    cls = type(optimizer).__name__
    tried: list[tuple[dict[str, Any], float]] = []
    states: list[float] = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
        known = next((count for other, count in tried if _equal(settings, other)), None)
        if known is not None or not group["params"]:
            states.append(known or 0.0)
            continue
        problem, count = None, 0.0
        for bits in (32, 8) if in_blocks(optimizer) else (0,):
            try:
                with torch.random.fork_rng(devices=[]):
                    outcome = try_on_pieces(optimizer, group, device, bits)
                problem, count = problem or outcome.problem, max(count, outcome.states)
            except Exception as error:  # whatever the rule says to flat parameters
                problem = f"on flat shards its step fails with {type(error).__name__}: {error}"
        if problem or scales_by_norm(optimizer):
            reason = _REASONS.get(cls.removesuffix("8bit").removesuffix("32bit"), problem)
            raise ConfigurationError(
                f"{name} ({type(optimizer).__module__}.{cls}) cannot update flat shards: {reason}. Chunks need an "
                "element-wise optimizer, one whose update of each element depends on that element's gradient and "
                "state only, such as AdamW, Adam, SGD, Adagrad, RMSprop or Lion."
            )
        tried.append((settings, count))
        states.append(count)
    return states


def _equal(settings: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are the same; a tensor among them is only the same as itself."""
    return settings.keys() == other.keys() and all(
        value is other[key] or (not isinstance(value, Tensor) and value == other[key])
        for key, value in settings.items()
    )
