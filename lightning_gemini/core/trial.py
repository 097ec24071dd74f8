"""The trial of an optimizer: a matrix, and the same numbers in two flat pieces.

It is made hard on what is not element-wise: the pieces differ in scale, and by turns, so that statistics of them do;
the first gradient is at right angles to the values, where some start to project; gradients have a trend, by which some
find a learning rate for all; there are enough steps for short warm-ups to end; and states are compared as well, since
they differ before anybody acts upon them.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core.blocks import BLOCK, grain, in_blocks, init_state, is_code_book

_SHAPE, _CUT, _STEPS = (8, 16), 37, 30
_SHAPE_IN_BLOCKS, _CUT_IN_BLOCKS = (8, 2 * BLOCK), 3 * BLOCK


def unhooked_step(optimizer: Optimizer) -> Any:
    """The optimizer's own ``step`` as a function, without torch's and anybody's hooks around it."""
    step = type(optimizer).step
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


@dataclass(frozen=True)
class Outcome:
    """What the trial of an optimizer has shown: what is wrong with it, if anything, and how much state it keeps."""

    problem: str | None
    states: float  #: elements of state for each element of a parameter


def try_on_pieces(optimizer: Optimizer, group: dict[str, Any], device: torch.device, bits: int) -> Outcome:
    """Tries the optimizer under the settings of ``group``.

    Args:
        bits: of its states, where it has to be told (see ``blocks``); else 0.
    """
    shape, first = (_SHAPE_IN_BLOCKS, _CUT_IN_BLOCKS) if bits == 8 else (_SHAPE, _CUT)
    values, *grads = (tensor.to(device) for tensor in _numbers(shape))
    cut = [first, values.numel() - first]
    flat = values.flatten().split(cut)
    whole = _train(optimizer, group, [values], [[grad] for grad in grads], bits)
    pieces = _train(optimizer, group, flat, [grad.flatten().split(cut) for grad in grads], bits)
    problem = next(_unshareable(pieces), None) or next(_differences(whole, pieces, values.flatten()), None)
    if problem is not None:
        return Outcome(problem, 0.0)
    kept = sum(v.numel() for state in whole.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim())
    return Outcome(problem, kept / values.numel())


def _numbers(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The values of a matrix, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    values, trend, *noise = (torch.randn(shape, generator=generator) for _ in range(_STEPS + 2))
    yield values
    for step, part in enumerate(noise):
        grad = (trend + 0.5 * part) / (1 + step % 3)
        grad[: len(grad) // 2] /= 4 + step % 5
        yield grad if step else grad - values * ((grad * values).sum() / values.square().sum())


def _unshareable(optimizer: Optimizer) -> Iterator[str]:
    """The states that cannot be cut with their parameter, nor be the same for all parts of it."""
    for param, state in optimizer.state.items():
        if not isinstance(param, Tensor):  # every chunk would count in it
            yield f"it keeps {param!r} for all parameters together, outside of its groups"
            continue
        for key, value in state.items():
            if isinstance(value, Tensor):
                if value.numel() > 1 and not is_code_book(key) and not grain(key, value, param.numel()):
                    yield f"its state {key!r} of shape {tuple(value.shape)} belongs to no element of a flat parameter"
            elif not _is_plain(value):
                yield f"its state {key!r}, a {type(value).__name__}, holds more than numbers and cannot be cut"


def _differences(whole: Optimizer, pieces: Optimizer, start: Tensor) -> Iterator[str]:
    """Where the two runs differ by more than rounding: in values, states or settings of the group."""
    (settings,), (others,) = whole.param_groups, pieces.param_groups
    (param,), parts = settings["params"], others["params"]
    moved = torch.cat([part.detach() for part in parts]) - start
    if not _close(param.detach().flatten() - start, moved, atol=1e-6):
        yield "the update of a matrix is not the update of the same numbers in two flat pieces"
    for key, value in whole.state[param].items():
        found = [pieces.state[part].get(key) for part in parts]
        if isinstance(value, Tensor) and value.shape == param.shape:
            same = not value.is_floating_point() or _close(value.flatten(), torch.cat(found), atol=0)
        else:
            same = all(_agree(value, other) for other in found)
        if not same:
            yield f"its state {key!r} of a matrix is not that of the same numbers in two flat pieces"
    for key in settings.keys() & others.keys() - {"params"}:
        if not _agree(settings[key], others[key]):
            yield f"its {key!r} of a matrix is not that of the same numbers in two flat pieces"


def _close(one: Tensor, other: Tensor, atol: float) -> bool:
    return torch.allclose(one, other, rtol=0, atol=atol + 1e-4 * float(one.abs().max()), equal_nan=True)


def _agree(one: Any, other: Any) -> bool:
    """Whether two numbers are the same but for rounding; anything else is not judged."""
    one, other = (value.item() if _is_number(value) else value for value in (one, other))
    if not isinstance(one, (int, float)) or not isinstance(other, (int, float)):
        return True
    return math.isclose(one, other, rel_tol=1e-4) or (math.isnan(one) and math.isnan(other))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, deque)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str)) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _train(
    optimizer: Optimizer, group: dict[str, Any], values: Sequence[Tensor], steps: Sequence[Sequence[Tensor]], bits: int
) -> Optimizer:
    """Steps as chunks are updated: the rule called for one piece after the other, the settings put back in between."""
    params = [nn.Parameter(value.clone()) for value in values]
    clone = _clone(optimizer, group, params)
    (settings,) = clone.param_groups
    for param in params if bits else ():
        init_state(clone, settings, param, bits)
    for grads in steps:
        before = dict(settings)
        for param, grad in zip(params, grads, strict=True):
            settings.clear()
            settings.update(before, params=[param])
            param.grad = grad.clone()
            with torch.enable_grad():
                unhooked_step(optimizer)(clone)
    settings["params"] = params
    return clone


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
    if sample is not None and not in_blocks(optimizer):  # some, such as Adagrad, make their state in the constructor
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
