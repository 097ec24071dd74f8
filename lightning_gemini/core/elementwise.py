"""Whether an optimizer works on flat shards: tried, not looked up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core.errors import ConfigurationError

_SHAPE, _CUT, _STEPS = (8, 16), 37, 3

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
    "SparseAdam": "it wants sparse gradients, and chunks hold dense ones",
}


def unhooked_step(optimizer: Optimizer) -> Any:
    """The optimizer's own ``step`` as a function, without torch's and anybody's hooks around it."""
    step = type(optimizer).step
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


def require_elementwise(optimizer: Optimizer, name: str, device: torch.device) -> None:
    """Runs the optimizer's rule on a matrix and on the same numbers in two flat pieces, one by one, and compares.

    Raises:
        ConfigurationError: they differ, so shards would be updated wrongly; ``name`` says which optimizer it is.
    """
    cls = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        try:
            with torch.random.fork_rng(devices=[]):
                whole, pieces = _try(optimizer, group, device)
            problem = _compare(whole, pieces)
        except Exception as error:  # whatever the rule says to flat parameters
            problem = f"on flat shards its step fails with {type(error).__name__}: {error}"
        if problem:
            reason = _REASONS.get(cls, problem)
            raise ConfigurationError(
                f"{name} ({type(optimizer).__module__}.{cls}) cannot update flat shards: {reason}. Chunks need an "
                "element-wise optimizer, one whose update of each element depends on that element's gradient and "
                "state only, such as AdamW, Adam, SGD, Adagrad, RMSprop or Lion."
            )


def _try(optimizer: Optimizer, group: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values, *grads = (torch.randn(_SHAPE, generator=generator).to(device) for _ in range(_STEPS + 1))
    whole = _train(optimizer, group, [values], [[grad] for grad in grads])
    cut = [_CUT, values.numel() - _CUT]
    pieces = _train(optimizer, group, values.flatten().split(cut), [grad.flatten().split(cut) for grad in grads])
    return whole.flatten(), pieces


def _train(
    optimizer: Optimizer, group: dict[str, Any], values: Sequence[Tensor], steps: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Steps as chunks are updated: the rule called for one piece after the other, the settings put back in between."""
    params = [nn.Parameter(value.clone()) for value in values]
    clone = _clone(optimizer, group, params)
    (settings,) = clone.param_groups
    for grads in steps:
        before = dict(settings)
        for param, grad in zip(params, grads, strict=True):
            settings.clear()
            settings.update(before, params=[param])
            param.grad = grad.clone()
            with torch.enable_grad():
                unhooked_step(optimizer)(clone)
    return torch.cat([param.detach().flatten() for param in params])


def _clone(optimizer: Optimizer, group: dict[str, Any], params: list[nn.Parameter]) -> Optimizer:
    """An optimizer of the same class and settings over ``params``; the original is not touched."""
    clone: Optimizer = object.__new__(type(optimizer))
    clone.__dict__ = dict(optimizer.__dict__)
    clone.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the original
    settings = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
    lr = settings.get("lr")
    if isinstance(lr, Tensor):
        settings["lr"] = torch.full_like(lr, 0.01)
    elif lr is not None:
        settings["lr"] = 0.01  # a warm-up may have set it to zero, and nothing would move
    clone.param_groups = [{**settings, "params": params}]
    clone.state = defaultdict(dict)
    made = [p for p in group["params"] if p in optimizer.state]
    sample = max(made, key=Tensor.dim, default=None)  # a 0-d parameter's state looks like a counter
    if sample is not None:  # some, such as Adagrad, make their state in the constructor
        for param in params:
            clone.state[param] = {key: _like(value, sample, param) for key, value in optimizer.state[sample].items()}
    return clone


def _like(value: Any, sample: Tensor, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape != sample.shape or value.dim() == 0:
        return value.clone()
    fill = 0.0 if value.is_meta or not value.numel() else float(value.flatten()[0])
    return torch.full_like(param, fill)


def _compare(whole: Tensor, pieces: Tensor) -> str | None:
    if not torch.allclose(whole, pieces, rtol=1e-3, atol=1e-6):
        return "the update of a matrix is not the update of the same numbers in two flat pieces"
    return None
