"""A Lightning checkpoint in two: tensors, which go into files of their own, and everything else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_gemini.checkpoint.flat import FlatTensor

#: In the place of a tensor: its name.
MARK = "lightning_gemini.tensor"

STATE_DICT = "state_dict"


def take_apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checkpoint with marks in the place of tensors, and these by name; ``checkpoint`` stays as it is.

    All tensors of the model's state dict are taken out, and from anywhere else those that are spread over the ranks. A
    name is the way to the tensor: ``state_dict.layer.weight``; one that is there twice, as tied weights are, has the
    first.
    """
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}

    def take(tensor: Tensor, path: str) -> dict[str, str]:
        name = names.setdefault(id(tensor), path)
        tensors[name] = tensor
        return {MARK: name}

    def visit(value: Any, path: str, every: bool) -> Any:
        if isinstance(value, FlatTensor) or (every and isinstance(value, Tensor)):
            return take(value, path)
        return _map_children(value, lambda key, child: visit(child, f"{path}.{key}", every))

    rest = {key: visit(value, key, every=key == STATE_DICT) for key, value in checkpoint.items()}
    return rest, tensors


def put_together(rest: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The inverse of :func:`take_apart`; ``tensor`` returns one by its name."""
    if isinstance(rest, dict) and rest.keys() == {MARK}:
        return tensor(rest[MARK])
    return _map_children(rest, lambda _, child: put_together(child, tensor))


def like(old: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` in the same kind of dict as ``old``; a state dict carries the versions of its modules beside it."""
    if not isinstance(old, OrderedDict):
        return dict(values)
    new = OrderedDict(values)
    new.__dict__.update(old.__dict__)
    return new


def _map_children(value: Any, change: Callable[[Any, Any], Any]) -> Any:
    """``value`` with its children changed; the same object, of whatever class, where none of them is."""
    if isinstance(value, dict):
        changed = {key: change(key, child) for key, child in value.items()}
        same = all(changed[key] is child for key, child in value.items())
        return value if same else like(value, changed)
    if type(value) in (list, tuple):
        parts = [change(index, child) for index, child in enumerate(value)]
        return value if all(new is old for new, old in zip(parts, value, strict=True)) else type(value)(parts)
    return value
