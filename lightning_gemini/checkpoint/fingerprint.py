"""What a checkpoint and a run must have in common for the one to go on from the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.errors import IncompatibleCheckpointError

_SHOWN = 8


def fingerprint(model: nn.Module, optimizers: Sequence[Optimizer], policy: DtypePolicy) -> dict[str, Any]:
    """Parameters, optimizers and precision as plain data for JSON; before the model is laid out or after."""
    names = {param: name for name, param in model.named_parameters()}
    return {
        "precision": _describe(policy),
        "parameters": {name: [_name(p.dtype), list(p.shape)] for p, name in names.items()},
        "optimizers": [
            {
                "class": type(optimizer).__name__,
                "groups": [[names.get(param, "?") for param in group["params"]] for group in optimizer.param_groups],
            }
            for optimizer in optimizers
        ],
    }


def require_same(
    saved: Mapping[str, Any], now: Mapping[str, Any], path: object, strict: bool = True, cast: bool = False
) -> None:
    """Compares two fingerprints.

    Args:
        path: of the checkpoint, for the error.
        strict: whether parameters have to be the same; otherwise only those of optimizers do.
        cast: whether precision and dtypes may differ.

    Raises:
        IncompatibleCheckpointError: they differ; it lists how.
    """
    found = [*_differences(saved, now, strict, cast)]
    if not found:
        return
    more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    lines = "".join(f"\n  - {line}" for line in [*found[:_SHOWN], *more])
    only_cast = not [*_differences(saved, now, strict, cast=True)]
    remedy = (
        "GeminiStrategy(resume='cast') converts weights and states to the present precision. "
        if only_cast
        else "Go on with the settings of the checkpoint. "
    )
    raise IncompatibleCheckpointError(
        f"{path} cannot be resumed by this run:{lines}\n{remedy}GeminiStrategy(resume='weights') takes the weights "
        "only and starts training anew."
    )


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], strict: bool, cast: bool) -> Iterator[str]:
    if not cast and saved["precision"] != now["precision"]:
        yield f"precision: {saved['precision']} in the checkpoint, {now['precision']} now"
    if strict:
        yield from _parameters(saved["parameters"], now["parameters"], cast)
    theirs, ours = saved["optimizers"], now["optimizers"]
    if len(theirs) != len(ours):
        yield f"optimizers: {_classes(theirs)} in the checkpoint, {_classes(ours)} now"
        return
    for number, (old, new) in enumerate(zip(theirs, ours, strict=True)):
        if old["class"] != new["class"]:
            yield f"optimizer {number}: {old['class']} in the checkpoint, {new['class']} now"
        if old["groups"] != new["groups"]:
            yield f"optimizer {number}: {_groups(old['groups'], new['groups'])}"


def _parameters(old: Mapping[str, Any], new: Mapping[str, Any], cast: bool) -> Iterator[str]:
    for name, (dtype, shape) in old.items():
        if name not in new:
            yield f"{name} {shape} is in the checkpoint only"
            continue
        now_dtype, now_shape = new[name]
        if shape != now_shape:
            yield f"{name}: shape {shape} in the checkpoint, {now_shape} now"
        if dtype != now_dtype and not cast:
            yield f"{name}: {dtype} in the checkpoint, {now_dtype} now"
    yield from (f"{name} {shape} is in the model only" for name, (_, shape) in new.items() if name not in old)


def _describe(policy: DtypePolicy) -> str:
    """The precision; how masters are kept does not matter, they have the same bits."""
    compute = "their own dtypes" if policy.compute is None else _name(policy.compute)
    masters = "with fp32 masters" if policy.master else "without masters"
    return f"parameters in {compute} {masters}, optimizer states in {_name(policy.state)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _classes(optimizers: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(one["class"] for one in optimizers) or "none"


def _groups(old: Sequence[Sequence[str]], new: Sequence[Sequence[str]]) -> str:
    if [len(group) for group in old] != [len(group) for group in new]:
        sizes = [" + ".join(str(len(group)) for group in groups) for groups in (old, new)]
        return f"groups of {sizes[0]} parameters in the checkpoint, of {sizes[1]} now"
    for number, (theirs, ours) in enumerate(zip(old, new, strict=True)):
        for index, (before, now) in enumerate(zip_longest(theirs, ours)):
            if before != now:
                return f"group {number} has {before} at place {index} in the checkpoint, {now} now"
    return "groups differ"
