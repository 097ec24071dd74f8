"""Reads that no hook announces: parameter access and tensors that autograd saved."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Mapping, Sequence, ValuesView
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_gemini.core.chunk import Chunk
from lightning_gemini.core.errors import HiddenReadError, StaleGraphError, StateError
from lightning_gemini.core.units import Unit


class ManagedParameters(dict[str, nn.Parameter | None]):
    """A module's ``_parameters`` that makes a parameter usable when it is read, as ``module.weight`` does.

    Args:
        read: called before a parameter is read outside of its unit's forward.
        listed: called when the parameters are listed, as ``module.parameters()`` does.
        before_copy: called before this is copied or pickled; may refuse it.
    """

    def __init__(
        self,
        items: Mapping[str, nn.Parameter | None],
        unit: Unit,
        read: Callable[[nn.Parameter], None],
        listed: Callable[[], None],
        before_copy: Callable[[], None],
    ) -> None:
        super().__init__(items)
        self._unit = unit
        self._read = read
        self._listed = listed
        self._before_copy = before_copy
        self._originals: dict[str, nn.Parameter | None] = {}  # of what functional_call has exchanged

    def items(self) -> ItemsView[str, nn.Parameter | None]:  # type: ignore[override]
        self._listed()
        return super().items()

    def values(self) -> ValuesView[nn.Parameter | None]:  # type: ignore[override]
        self._listed()
        return super().values()

    def __getitem__(self, name: str) -> nn.Parameter | None:
        param = dict.__getitem__(self, name)
        if not self._unit.active and param is not None and name not in self._originals:
            self._read(param)
        return param

    def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
        current = dict.get(self, name)
        if name not in self:
            self._refuse(name)
        elif name in self._originals and self._originals[name] is value:
            del self._originals[name]
        elif value is not current and name not in self._originals:
            if type(value) is nn.Parameter or value is None:
                self._refuse(name)
            self._originals[name] = current  # torch.func.functional_call: it puts the parameter back
        dict.__setitem__(self, name, value)

    def __delitem__(self, name: str) -> None:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise StateError(
            f"parameter {name!r} of {self._unit.name} was replaced, added or removed after the chunks were laid out. "
            "Change the model before fit (in __init__, setup or configure_model), or change values inside "
            "summon_full_params(writeback=True)."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._before_copy()
        return dict, (dict(self),)  # a copy or a pickle belongs to no engine


def manage(
    unit: Unit, read: Callable[[nn.Parameter], None], listed: Callable[[], None], before_copy: Callable[[], None]
) -> None:
    """Has the parameters of ``unit`` announce their reads; not inside a compiled unit, whose graph it would split."""
    for module in () if unit.compiled else unit.owners:
        module.__dict__["_parameters"] = ManagedParameters(module._parameters, unit, read, listed, before_copy)


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
        self._by_storage: dict[int, Chunk | str] = {c.full.untyped_storage()._cdata: c for c in chunks}
        self._by_storage |= {cdata: name for c in chunks for name, cdata in c.placeholder_storages()}

    def chunk_of(self, tensor: Tensor) -> Chunk | None:
        """The chunk that ``tensor`` is an alias of, if it may be freed."""
        try:
            found = self._by_storage.get(tensor.untyped_storage()._cdata)
        except (RuntimeError, NotImplementedError):
            return None  # no storage of the ordinary kind: sparse, a subclass, a functorch wrapper
        return found if isinstance(found, Chunk) else None

    def hooks(self) -> AbstractContextManager[Any]:
        """A context in which what autograd saves goes through here."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        try:
            chunk = self._by_storage.get(tensor.untyped_storage()._cdata)
        except (RuntimeError, NotImplementedError):
            return tensor  # no storage of the ordinary kind: sparse, a subclass, a functorch wrapper
        if isinstance(chunk, str):
            raise HiddenReadError(
                f"an operation read {chunk} in a way that no hook sees (a loop over self.parameters(), a weight kept "
                "in a list, functional_call) while its chunk was free, and got NaN. Run with check=True, which "
                "serves and names such reads; or read it through its module. The weights are unchanged."
            )
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
