"""Units: the modules whose parameters become usable together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from lightning_gemini.core.errors import ConfigurationError


@dataclass(eq=False)
class Unit:
    """A module that is hooked, and the modules whose parameters it makes usable.

    A module that owns no parameter but has some inside is a unit too, with nothing of its own: its forward bounds how
    long what it reads of other modules' parameters must stay usable.

    Attributes:
        name: the module's full name, ``"model"`` for the root.
        module: the module whose forward and backward are the unit's.
        owners: the modules that own the unit's parameters: ``module``, and its submodules in a coarser unit.
        params: indices of the parameters, in ``Layout.params``, each once.
        compiled: whether the module is compiled or scripted, so that nothing of ours may sit inside it.
        active: how many forwards of the unit are running.
    """

    name: str
    module: nn.Module
    owners: tuple[nn.Module, ...]
    params: tuple[int, ...]
    compiled: bool = False
    active: int = 0


def find_units(root: nn.Module, index_of: dict[nn.Parameter, int], coarse: Collection[str | type] = ()) -> list[Unit]:
    """Each module with parameters, and, where a module is in ``coarse`` or compiled, the whole of it as one.

    Args:
        root: the model.
        index_of: the managed parameters and their indices.
        coarse: module classes, their names with or without the package, or full names of modules in ``root``.

    Raises:
        ConfigurationError: an entry of ``coarse`` matches no module.
    """
    if isinstance(coarse, str):
        raise ConfigurationError(f"unit_modules must be a list, such as [{coarse!r}], got the text {coarse!r}.")
    for entry in coarse:
        if not any(_matches(entry, module, name) for name, module in root.named_modules()):
            known = sorted({type(module).__name__ for module in root.modules()})
            raise ConfigurationError(
                f"unit_modules names {entry!r}, which is no module of this model. It takes classes, class names or "
                f"full module names; the classes here are {', '.join(known)}."
            )
    units: list[Unit] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        if module in seen:
            return
        compiled = is_compiled(module)
        whole = compiled or any(_matches(entry, module, name) for entry in coarse)
        members = [m for m in module.modules() if m not in seen] if whole else [module]
        seen.update(members)
        owners = tuple(m for m in members if any(p is not None for p in m._parameters.values()))
        params = dict.fromkeys(index_of[p] for m in owners for p in m._parameters.values() if p is not None)
        if params or any(param in index_of for param in module.parameters()):
            units.append(Unit(name or "model", module, owners, tuple(params), compiled))
        if not whole:
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}" if name else child_name)

    visit(root, "")
    return units


def is_compiled(module: nn.Module) -> bool:
    """Whether this very module runs as one piece: by ``torch.compile``, ``module.compile()`` or ``torch.jit``."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _matches(entry: str | type, module: nn.Module, name: str) -> bool:
    if isinstance(entry, type):
        return isinstance(module, entry)
    cls = type(module)
    return bool(entry) and entry in (name, cls.__name__, f"{cls.__module__}.{cls.__qualname__}")
