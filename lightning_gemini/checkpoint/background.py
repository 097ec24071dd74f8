"""Saves in the background: training waits for a copy in host memory and not for the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta

import torch
from torch import Tensor

from lightning_gemini.checkpoint.flat import FlatTensor, Source
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.slabs import Slabs
from lightning_gemini.core.worker import Worker

_WHAT = "the snapshot of a checkpoint (async_save=True)"


class BackgroundSaves:
    """Writes one checkpoint at a time in a thread of its own. All ranks call its methods at the same moments.

    Args:
        host: where snapshots are counted; their memory is kept from one save to the next.
        pin: page-lock it, for copies from the device.
        all_say: whether all ranks say yes, given what this one says; they exchange it.
    """

    def __init__(self, host: Tier, pin: bool, all_say: Callable[[bool], bool]) -> None:
        self._memory = Slabs(host, pin)
        self._all_say = all_say
        self._used: list[Tensor] = []
        self._worker = Worker("gemini-save")
        self._saving: Future[None] | None = None

    def snapshot(self, tensors: Iterable[Tensor]) -> None:
        """Copies what the flat tensors among ``tensors`` lie in, for :meth:`start`; waits for the save before.

        Raises:
            CheckpointWriteError: the save before has failed.
            OutOfBudgetError: there is no room for the copies on this rank.
        """
        self.wait()
        sources = dict.fromkeys(run.source for one in tensors if isinstance(one, FlatTensor) for run in one.runs)
        self._copy_all(list(sources))

    def start(self, write: Callable[[], None]) -> None:
        """Has ``write`` called in the background."""
        self._saving = self._worker.submit(write)

    def then(self, job: Callable[[], None]) -> bool:
        """Has ``job`` done when the save under way is over, unless it fails; says False if there is none."""
        saving = self._saving
        if saving is None:
            return False

        def follow() -> None:
            saving.result()
            job()

        self._saving = self._worker.submit(follow)
        return True

    def check(self) -> None:
        """Raises what the last save has raised, if it is over on all ranks."""
        if self._saving is not None and self._all_say(self._saving.done()):
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way, and raises what it raises, once."""
        if self._saving is not None:
            self._end(self._saving, None)

    def finish(self, patience: timedelta | None) -> str:
        """Waits for the save under way, when the run has failed already.

        Args:
            patience: how long to wait; ``None`` for as long as it takes.

        Returns:
            why there is no checkpoint; empty if there is one, or if there was no save under way.
        """
        saving = self._saving
        if saving is None:
            return ""
        try:
            self._end(saving, None if patience is None else patience.total_seconds())
        except TimeoutError as error:
            return str(error) if saving.done() else "a save in the background has not come to its end"
        except Exception as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Ends the thread when it has written what it has begun, and gives the memory back; waits for nobody."""
        self._worker.close()
        if self._saving is None:
            self._memory.close()

    def _end(self, saving: Future[None], seconds: float | None) -> None:
        try:
            saving.result(seconds)
        finally:
            if saving.done():
                self._saving = None
                self._give_back()

    def _give_back(self) -> None:
        for copy in self._used:
            self._memory.put(copy)
        self._used.clear()

    def _copy_all(self, sources: list[Source]) -> None:
        self._give_back()  # a snapshot that another rank had no room for
        sizes = [part.nbytes for source in sources for part in source.parts]
        if self._memory.free_bytes < sum(sizes):
            self._memory.trim()  # optimizers have states now that were not there before
            self._memory.reserve(sizes, _WHAT)
        devices = {part.device for source in sources for part in source.parts if part.is_cuda}
        for source in sources:
            source.freeze(self._copy)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()  # copies to pinned memory are only begun

    def _copy(self, part: Tensor) -> Tensor:
        copy = self._memory.get(part.numel(), part.dtype, _WHAT)
        self._used.append(copy)
        return copy.copy_(part, non_blocking=True)
