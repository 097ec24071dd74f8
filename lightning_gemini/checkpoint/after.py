"""What is left of a run, for a checkpoint that is saved when it is over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_gemini.checkpoint.contents import like
from lightning_gemini.checkpoint.flat import FlatTensor, Source
from lightning_gemini.checkpoint.state import flat_model, flat_optimizer
from lightning_gemini.core import Engine


class After:
    """The state of an engine that is about to be released: sharded as it was, in host memory.

    Args:
        engine: with all its ranks between two steps.
        module: its model.
        frozen: whether parameters that require no gradient are kept.

    Attributes:
        state: of the model.
        left_out: the keys that are not in it.
        optimizers: the states of the optimizers.
    """

    def __init__(self, engine: Engine, module: nn.Module, frozen: bool) -> None:
        self.state, self.left_out = flat_model(engine, module, frozen)
        self.state = like(self.state, {key: _kept(value) for key, value in self.state.items()})
        self.optimizers = [flat_optimizer(engine, chunks.optimizer) for chunks in engine.optimizers]
        self._module = module
        self._values: list[tuple[int, int]] = []

    @property
    def nbytes(self) -> int:
        """Of host memory that it takes."""
        return sum(part.nbytes for source in self._sources() for part in source.parts)

    def settle(self) -> None:
        """When the engine has been released: from now on changes of the model's weights count."""
        for source in self._sources():
            source.freeze(Tensor.cpu)
        self._values = self._look()

    @property
    def stale(self) -> bool:
        """Whether the model has other weights now."""
        return self._values != self._look()

    def _look(self) -> list[tuple[int, int]]:
        return [(param.data_ptr(), param._version) for param in self._module.parameters()]

    def _sources(self) -> Iterator[Source]:
        states = [value for one in self.optimizers for state in one["state"].values() for value in state.values()]
        flat: Sequence[Any] = [*self.state.values(), *states]
        yield from dict.fromkeys(run.source for one in flat if isinstance(one, FlatTensor) for run in one.runs)


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) and not isinstance(value, FlatTensor) else value
