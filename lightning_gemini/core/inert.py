"""Hooks that stay behind when their module is copied or pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def nothing(*_: Any, **__: Any) -> None:
    """What such a hook is in the copy."""


def _nothing() -> Callable[..., None]:
    return nothing


class Attached:
    """Calls ``hook``; a copy of it does nothing, so that a copied module belongs to no engine."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(*args, **kwargs)

    def __deepcopy__(self, _: Any) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> Any:
        return _nothing, ()
