"""Ranks that have different numbers of batches: refused before they start, or ended together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gemini.core import ConfigurationError
from lightning_gemini.core.collectives import Collectives


def require_even(collectives: Collectives, batches: Sequence[int | float], what: str) -> None:
    """Compares the ranks' numbers of batches in each loader; all ranks have to call.

    Raises:
        ConfigurationError: they differ; a rank that has ended would leave the others waiting for ever.
    """
    every = collectives.gather_objects(list(batches), f"the numbers of {what} batches")
    if any(numbers != every[0] for numbers in every):
        listed = ", ".join(f"rank {rank}: {numbers}" for rank, numbers in enumerate(every))
        raise ConfigurationError(
            f"the ranks have different numbers of {what} batches ({listed}), but each step needs all ranks. Give every "
            "rank as many (Lightning's own DistributedSampler does), or limit them to the smallest with "
            f"limit_{ {'training': 'train', 'validation': 'val', 'prediction': 'predict'}.get(what, what) }_batches."
        )


def even(loader: Any, vote: Callable[[bool], bool]) -> Any:
    """``loader``, or if it has no length one that ends on all ranks when it ends on the first of them."""
    return loader if sized_len(loader) is not None else EvenLoader(loader, vote)


class EvenLoader:
    """Asks before each batch whether every rank has one; everything else is the loader's.

    Args:
        vote: takes whether this rank has another batch, returns whether all have; all ranks have to call it.
    """

    def __init__(self, loader: Any, vote: Callable[[bool], bool]) -> None:
        self._loader = loader
        self._vote = vote
        for name in ("state_dict", "load_state_dict"):  # looked for without __getattr__ from Python 3.12 on
            if hasattr(loader, name):
                setattr(self, name, getattr(loader, name))

    def __iter__(self) -> Iterator[Any]:
        batches, number, end = iter(self._loader), 0, object()
        while True:
            batch = next(batches, end)
            if not self._vote(batch is not end):
                break
            yield batch
            number += 1
        if batch is not end:
            rank_zero_warn(f"another rank ended its data after {number} batches; all ranks end there.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)
