"""Reads that no hook announces: parameter access and tensors that autograd saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.errors import StaleGraphError, StateError
from lightning_gemini.core.units import Unit


class ManagedParameters(dict[str, nn.Parameter | None]):
    """A module's ``_parameters`` that makes a parameter usable when it is read, as ``module.weight`` does."""

    def __init__(
        self, items: Mapping[str, nn.Parameter | None], unit: Unit, read: Callable[[nn.Parameter], None]
    ) -> None:
        super().__init__(items)
        self._unit = unit
        self._read = read

    def __getitem__(self, name: str) -> nn.Parameter | None:
        param = dict.__getitem__(self, name)
        if not self._unit.active and param is not None:
            self._read(param)
        return param

    def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
        if name not in self or dict.__getitem__(self, name) is not value:
            self._refuse(name)

    def __delitem__(self, name: str) -> None:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise StateError(
            f"parameter {name!r} of {self._unit.name} was replaced, added or removed after the chunks were laid out. "
            "Change the model before fit (in __init__, setup or configure_model), or change values inside "
            "summon_full_params(writeback=True)."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)  # a copy or a pickle belongs to no engine


def manage(unit: Unit, read: Callable[[nn.Parameter], None]) -> None:
    """Has the parameters of ``unit`` announce their reads; not inside a compiled unit, whose graph it would split."""
    for module in () if unit.compiled else unit.owners:
        module.__dict__["_parameters"] = ManagedParameters(module._parameters, unit, read)


def unmanage(unit: Unit) -> None:
    """Undoes :func:`manage`."""
    for module in unit.owners:
        module.__dict__["_parameters"] = dict(module._parameters)


class _Saved:
    """Where a tensor that autograd saved lies in its chunk."""

    __slots__ = ("chunk", "conj", "dtype", "neg", "offset", "size", "slot", "stride", "version")

    def __init__(self, chunk: Chunk, tensor: Tensor) -> None:
        self.chunk = chunk
        self.dtype = tensor.dtype
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.slot = chunk.slot_at(self.offset * tensor.dtype.itemsize // chunk.full.dtype.itemsize)
        self.version = chunk.params[self.slot]._version
        self.conj = tensor.is_conj()
        self.neg = tensor.is_neg()


class SavedTensors:
    """Hooks for what autograd saves: an alias of a chunk that may be freed is kept as a place, not as a tensor."""

    def __init__(self, chunks: Sequence[Chunk], fetch: Callable[[Chunk], None]) -> None:
        self._fetch = fetch
        self._by_storage = {c.full.untyped_storage()._cdata: c for c in chunks if c.home is not Home.FULL}

    def hooks(self) -> AbstractContextManager[Any]:
        """A context in which what autograd saves goes through here."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        try:
            chunk = self._by_storage.get(tensor.untyped_storage()._cdata)
        except (RuntimeError, NotImplementedError):
            return tensor  # no storage of the ordinary kind: sparse, a subclass, a functorch wrapper
        return tensor if chunk is None else _Saved(chunk, tensor)

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        chunk = saved.chunk
        if chunk.params[saved.slot]._version != saved.version:
            raise StaleGraphError(
                f"backward needs {chunk.names[saved.slot]} as it was in the forward, but an optimizer step has changed "
                "it since. Run the backward before the step, or the forward again after it."
            )
        self._fetch(chunk)
        flat = chunk.full if saved.dtype == chunk.full.dtype else chunk.full.view(saved.dtype)
        tensor = flat.as_strided(saved.size, saved.stride, saved.offset)
        tensor = tensor.conj() if saved.conj else tensor
        return torch._neg_view(tensor) if saved.neg else tensor
