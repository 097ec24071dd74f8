"""Weights of a checkpoint on their way into chunks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_gemini.checkpoint.lazy import LazyTensor, LoadedValues
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.checkpoint.state import load_weights, refresh
from lightning_gemini.core.collectives import Collectives
from lightning_gemini.core.construct import leave_meta, leave_meta_to_load, return_to_meta, write
from lightning_gemini.core.errors import CheckpointError, IncompatibleCheckpointError
from lightning_gemini.core.store import Store


class LoadedWeights:
    """What ``module.load_state_dict(state)`` was asked to write; a source of weights for the engine.

    Args:
        values: by parameter. What is stored in a sharded checkpoint is read by each rank for itself, as far as it owns
            it; of other tensors rank 0's count. Rank 0 decides which are which, too.
        before: of the module.

    Attributes:
        params: that it has values for.
        unbuilt: parameters that were on ``meta`` and are placeholders now, with a value here or not.
    """

    def __init__(self, values: Mapping[nn.Parameter, Tensor], before: Before) -> None:
        self.unbuilt = before.unbuilt
        self._values, self._before = values, before
        self.params: Collection[nn.Parameter] = values.keys()

    def take_back(self) -> None:
        """Makes the module what it was before, as long as there are no chunks."""
        self._before.restore()

    @torch.no_grad()
    def fill(self, store: Store, index_of: Mapping[nn.Parameter, int]) -> None:
        """Writes the values into the chunks; all ranks together.

        Raises:
            CheckpointError: a file is damaged, or the ranks were given different weights, on any rank.
        """
        values = {index_of[param]: value for param, value in self._values.items()}
        names = {i: v.fqn if isinstance(v, LazyTensor) and v.kept is None else None for i, v in values.items()}
        wanted: dict[int, str | None] = store.collectives.broadcast_object(names)
        stored: dict[CheckpointReader, dict[int, str]] = {}
        with on_all(store.collectives):
            for index, name in wanted.items():
                value = values.get(index)
                if value is None or (name is not None and not isinstance(value, LazyTensor)):
                    raise CheckpointError(
                        f"rank {store.collectives.rank} loads other weights than rank 0, such as "
                        f"{store.layout.params[index].name}. on_load_checkpoint has to make the same changes on all "
                        "ranks."
                    )
                if name is not None and isinstance(value, LazyTensor):
                    stored.setdefault(value.reader, {})[index] = name
        for reader, names_there in stored.items():
            with on_all(store.collectives):
                changed = load_weights(store, names_there, reader)
            refresh(store, changed)
        for index in sorted(index for index, name in wanted.items() if name is None):
            value = values[index]
            write(store, index, value.read() if isinstance(value, LazyTensor) else value)


class Before:
    """A module before a state dict is loaded into it.

    Attributes:
        unbuilt: parameters that were on ``meta`` and are placeholders now.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        self.unbuilt = leave_meta(module, torch.device("cpu"))

    @torch.no_grad()
    def restore(self) -> None:
        """Buffers have their values again, and what was on ``meta`` is there again."""
        for buffer, value in self._buffers:
            if not value.is_meta:
                buffer.copy_(value)
        return_to_meta(self._module, self.unbuilt)


def note_values(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[LoadedWeights, list[str], list[str]]:
    """``module.load_state_dict(state, strict=False)``, but for the copies into parameters, which come later.

    Buffers have their values afterwards; parameters may be on ``meta``, and become placeholders in host memory.

    Returns:
        the weights, and the missing and the unexpected keys.

    Raises:
        IncompatibleCheckpointError: a tensor has another shape; the module is as it was.
    """
    before = Before(module)
    try:
        leave_meta_to_load(module, state.keys())
        with LoadedValues(list(module.parameters())) as loaded:
            result = module.load_state_dict(state, strict=False)
    except BaseException as error:
        before.restore()
        if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
            raise IncompatibleCheckpointError(str(error)) from error
        raise
    return LoadedWeights(loaded.values, before), list(result.missing_keys), list(result.unexpected_keys)


@contextmanager
def on_all(collectives: Collectives) -> Iterator[None]:
    """Around what this rank does alone: a checkpoint that one rank cannot read is an error on all of them."""
    failed: CheckpointError | None = None
    try:
        yield
    except CheckpointError as error:
        failed = error
    every = collectives.gather_objects(None if failed is None else (type(failed), str(failed)), "checkpoint errors")
    if failed is not None:
        raise failed
    for kind, text in filter(None, every):
        raise kind(text)
