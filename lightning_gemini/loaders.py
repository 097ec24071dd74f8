"""Data loaders that know where they are, and can begin there."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, cast

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.types import _Stateful
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, sampler
from torch.utils.data.distributed import DistributedSampler

from lightning_gemini.random_state import (
    State,
    generator_state,
    is_generator,
    random_state,
    same_state,
    set_generator_state,
    set_random_state,
)

#: samplers that draw from the global generators once, when they are asked for their first index
_DRAW_ONCE = (
    sampler.SequentialSampler,
    sampler.RandomSampler,
    sampler.SubsetRandomSampler,
    sampler.WeightedRandomSampler,
    DistributedSampler,
    DistributedSamplerWrapper,
)


def resumable(loader: Any) -> Any:
    """``loader`` as one that knows its position, if that can be; else ``loader`` itself.

    - An ordinary ``DataLoader`` over a dataset with indices, with samplers of any kind, becomes a copy of itself that
      is a :class:`PositionedLoader` as well.
    - A loader that has ``state_dict`` and ``load_state_dict`` looks after itself. Where it has no length, Lightning
      holds one batch in advance; it then becomes a :class:`LaggingLoader`.
    - Of an ``IterableDataset``, or any other iterable, nobody knows the position.
    """
    if isinstance(loader, PositionedLoader) or _is_ordinary(loader):
        positioned = copy.copy(loader)
        positioned.__class__ = _positioned(type(loader))  # type: ignore[arg-type]
        positioned._start = positioned._latest = None
        positioned._iterator = None  # of its workers, if they are to stay: the copy makes its own
        return positioned
    return LaggingLoader(loader) if isinstance(loader, _Stateful) and sized_len(loader) is None else loader


def _is_ordinary(loader: object) -> bool:
    """Whether it is torch that asks the samplers of this loader for indices."""
    kind: Any = type(loader)
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader, _Stateful)
        and not isinstance(loader.dataset, IterableDataset)
        and (loader.in_order or not loader.num_workers)
        and all(getattr(kind, name) is getattr(DataLoader, name) for name in ("__iter__", "_get_iterator"))
        and kind._index_sampler is DataLoader._index_sampler
    )


class PositionedLoader(DataLoader[Any]):
    """A ``DataLoader`` that can begin in the middle of an epoch, with the samples that an uninterrupted run would get.

    The batches before the position are not loaded, their indices are drawn again: from the states that the global
    generators had when the epoch's iterator was made and when the samplers drew from them, and from those of the
    generators that are attributes of the loader, of its samplers and of its dataset. Iterating from a position leaves
    the global generators as they were. What worker processes draw is not part of a position.

    Made by :func:`resumable`.
    """

    _start: Mapping[str, Any] | None = None
    _making: _Draws | None = None
    _latest: _Draws | None = None

    def __iter__(self) -> Any:
        start, self._start = self._start, None
        before = random_state()
        if start is not None:
            if "begun" in start:
                set_random_state(start["begun"])
            self.set_generators(start, "begun")
        once = type(self.batch_sampler) in (BatchSampler, type(None))
        once = once and type(getattr(self.batch_sampler, "sampler", self.sampler)) in _DRAW_ONCE
        draws = self._making = self._latest = _Draws(start or {}, self.generator_states(), once)
        try:
            batches = super().__iter__()
            if draws.indices is not None:
                draws.indices.skip()  # workers have been given indices already, then this is done
            return PositionedIterator(self, batches, draws)
        finally:
            self._making = draws.indices = None
            if start is not None:
                set_random_state(before)
                self.set_generators(start)

    @property
    def _index_sampler(self) -> Any:
        return _Indices(super()._index_sampler, self)

    def state_dict(self) -> State:
        """Where the iteration is that was begun last: plain data and tensors."""
        return {} if self._latest is None else self._latest.position(self.generator_states())

    def state_before(self) -> State:
        """The state before the last batch."""
        return {} if self._latest is None else self._latest.position(self.generator_states(), ahead=1)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Has the next iteration begin where another loader was; an empty state means the beginning."""
        self._start = state_dict or None

    @property
    def seed(self) -> int | None:
        """What a sampler such as Lightning's ``DistributedSampler`` shuffles by, beside the epoch's number."""
        seed = getattr(getattr(self.batch_sampler, "sampler", self.sampler), "seed", None)
        return seed if isinstance(seed, int) else None

    @seed.setter
    def seed(self, seed: int) -> None:
        cast(Any, getattr(self.batch_sampler, "sampler", self.sampler)).seed = seed

    def generator_states(self) -> dict[str, Any]:
        """The states of the generators that are attributes of this loader, its samplers and its dataset, by name."""
        return {name: generator_state(generator) for name, generator in self._generators().items()}

    def _generators(self) -> dict[str, Any]:
        owners = {"loader": self, "batch_sampler": self.batch_sampler, "dataset": self.dataset}
        owners["sampler"] = getattr(self.batch_sampler, "sampler", self.sampler)
        if isinstance(owners["sampler"], DistributedSamplerWrapper):
            owners["sampler.sampler"] = owners["sampler"].dataset._sampler
        found: dict[str, Any] = {}
        for place, owner in owners.items():
            for name, value in getattr(owner, "__dict__", {}).items():
                if is_generator(value) and not any(value is other for other in found.values()):
                    found[f"{place}.{name}"] = value
        return found

    def set_generators(self, position: Mapping[str, Any], when: str = "now") -> None:
        """Puts those generators where they were at a position, or where they were when its epoch was "begun"."""
        for name, generator in self._generators().items():
            if name in position.get("generators", {}):
                set_generator_state(generator, position["generators"][name][when])


class PositionedIterator:
    """One iteration over a :class:`PositionedLoader`."""

    def __init__(self, loader: PositionedLoader, batches: Iterator[Any], draws: _Draws) -> None:
        self._loader = loader
        self._batches = batches
        self._draws = draws

    def __iter__(self) -> PositionedIterator:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._draws.yielded += 1
        return batch

    def position(self, ahead: int = 0) -> State:
        """Where this iteration is, not counting the last ``ahead`` batches that it has handed out."""
        return self._draws.position(self._loader.generator_states(), ahead)


class _Draws:
    """The draws of one iteration: how many batches had their indices drawn, and from what.

    Knows no iterator over batches: that one's workers end when the last reference to it goes.

    Args:
        start: the position to begin at.
        generators: the states that the loader's own generators have at the beginning.
        once: whether nothing but the first draw is from the global generators.

    Attributes:
        skip: batches to leave out.
        yielded: batches that were left out or handed out.
        indices: the iterator over indices, while the one over batches is being made.
    """

    def __init__(self, start: Mapping[str, Any], generators: dict[str, Any], once: bool) -> None:
        self._begun = random_state()
        self._generators = generators
        self._once = once
        self._replayed: Mapping[int, State] = start.get("draws", {})
        self._states: dict[int, State] = {}  # of the global generators before a draw that has changed them
        self.skip = self.yielded = start.get("batches", 0)
        self.indices: _IndexIterator | None = None

    def draw(self, indices: Iterator[Any], number: int) -> Any:
        """The indices of the batch with this number, drawn as in the iteration that is replayed."""
        if number in self._replayed:
            set_random_state(self._replayed[number])
        if number and self._once:
            return next(indices)
        before = random_state()
        try:
            return next(indices)
        finally:
            if not same_state(before, random_state()):
                self._states = self._needed(self.yielded) | {number: before}

    def _needed(self, batches: int) -> dict[int, State]:
        """What a sampler remembers may come from its first draw or from its last; what is ahead comes again."""
        done = [number for number in self._states if number < batches]
        return {number: state for number, state in self._states.items() if number not in done[1:-1]}

    def position(self, generators: Mapping[str, Any], ahead: int = 0) -> State:
        batches = max(0, self.yielded - ahead)
        return {
            "batches": batches,
            "begun": self._begun,
            "draws": self._needed(batches),
            "generators": {
                name: {"begun": state, "now": generators[name]}
                for name, state in self._generators.items()
                if name in generators
            },
        }


class _Indices:
    """A loader's index sampler, followed where it is the loader itself that iterates."""

    def __init__(self, sampler: Iterable[Any], loader: PositionedLoader) -> None:
        self._sampler = sampler
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        indices, draws = iter(self._sampler), self._loader._making
        if draws is None:
            return indices
        draws.indices = _IndexIterator(indices, draws)
        return draws.indices

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]


class _IndexIterator:
    def __init__(self, indices: Iterator[Any], draws: _Draws) -> None:
        self._indices = indices
        self._draws = draws
        self._number = 0

    def __iter__(self) -> _IndexIterator:
        return self

    def __next__(self) -> Any:
        self.skip()
        return self._next()

    def skip(self) -> None:
        while self._number < self._draws.skip:
            try:
                self._next()
            except StopIteration:  # the epoch has fewer batches now, and ends here
                return

    def _next(self) -> Any:
        drawn = self._draws.draw(self._indices, self._number)
        self._number += 1
        return drawn


class LaggingLoader:
    """A stateful loader that also knows its state before the batch that it has handed out last.

    Everything else is the loader's.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._before: Any = None

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            self._before = self._loader.state_dict()
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def state_dict(self) -> Any:
        return self._loader.state_dict()

    def state_before(self) -> Any:
        """The state before the last batch."""
        return self._before

    def load_state_dict(self, state_dict: Any) -> None:
        self._loader.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


@cache
def _positioned(kind: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    if issubclass(kind, PositionedLoader):
        return kind
    return type(kind.__name__, (PositionedLoader, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
