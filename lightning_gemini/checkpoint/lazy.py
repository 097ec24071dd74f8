"""Tensors of a checkpoint that are read when somebody wants their values, and not before."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_gemini.checkpoint.reader import CheckpointReader

#: In the place of an optimizer's states in a file: the number of the optimizer.
LAZY_STATES = "lightning_gemini.states"

#: In a manifest: the tensors that are not spread over the ranks, buffers mostly.
PLAIN = "plain"


class _Stored:
    """A tensor in a checkpoint, which several :class:`LazyTensor` may stand for.

    Attributes:
        value: the whole, in host memory, once somebody has been given a way to write to it.
    """

    def __init__(self, reader: CheckpointReader, fqn: str) -> None:
        self.reader, self.fqn = reader, fqn
        self.value: Tensor | None = None


class LazyTensor(Tensor):
    """A tensor in a checkpoint: shape and dtype at once, the values from the file in every operation that needs them.

    It may be written to, and is what was written from then on.

    Args:
        reader: of the checkpoint.
        fqn: the tensor's name in it.
    """

    _stored: _Stored

    def __new__(cls, reader: CheckpointReader, fqn: str) -> LazyTensor:
        return cls._of(_Stored(reader, fqn))

    @classmethod
    def _of(cls, stored: _Stored) -> LazyTensor:
        saved = stored.reader.manifest.tensors[stored.fqn]
        made: LazyTensor = Tensor._make_wrapper_subclass(
            cls, tuple(saved.shape), dtype=saved.dtype, device=torch.device("cpu")
        )
        made._stored = stored
        return made

    @property
    def reader(self) -> CheckpointReader:
        return self._stored.reader

    @property
    def fqn(self) -> str:
        return self._stored.fqn

    @property
    def kept(self) -> Tensor | None:
        """The whole, if somebody may have written to it: then its values are not those of the checkpoint any more."""
        return self._stored.value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls._of(args[0]._stored)
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None:  # it is written to, or the result is a view of it
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                tree_map_only(LazyTensor, LazyTensor._keep, given)
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.read, (args, kwargs))
        return func(*args, **kwargs)

    def read(self) -> Tensor:
        """The whole, in host memory."""
        return self.reader.tensor(self.fqn) if self.kept is None else self.kept

    def _keep(self) -> None:
        with torch.inference_mode(False):
            self._stored.value = self.read()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyTensor({self.fqn}, {list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyTensor:
        copy = LazyTensor(self.reader, self.fqn)
        if self.kept is not None:
            copy._stored.value = self.kept.clone()
        return copy


def stored_tensor(reader: CheckpointReader, name: str) -> Tensor:
    """A tensor of a checkpoint: lazy if it was spread over the ranks, else as it is, for a module that keeps it."""
    return reader.tensor(name) if name in reader.manifest.about.get(PLAIN, ()) else LazyTensor(reader, name)


class LazyStates(dict[int, Any]):
    """The states of optimizer ``number`` in a checkpoint, in the place of ``state_dict()["state"]``; empty to look at.

    Each rank reads its own part of them, into chunks.
    """

    def __init__(self, reader: CheckpointReader, number: int) -> None:
        super().__init__()
        self.reader, self.number = reader, number


class LoadedValues(TorchFunctionMode):
    """Around ``module.load_state_dict``: notes what each parameter is to be instead of copying it.

    Names, shapes, hooks and strictness are torch's own business; only the copies do not happen. So nothing is read
    before there are chunks, and no parameter needs memory for it.

    Args:
        params: that are not to be written to.

    Attributes:
        values: by parameter; the last one, where one is loaded under several names.
    """

    def __init__(self, params: Collection[nn.Parameter]) -> None:
        super().__init__()
        self._params = {id(param) for param in params}
        self.values: dict[nn.Parameter, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and id(args[0]) in self._params:
            self.values[args[0]] = args[1].detach()
            return args[0]
        return func(*args, **(kwargs or {}))
