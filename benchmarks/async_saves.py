"""Saves in the background as the strategy makes them, without a Trainer."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from benchmarks.savers import flat_tensors, trained
from benchmarks.workload import Workload
from lightning_gemini.checkpoint.fingerprint import fingerprint
from lightning_gemini.checkpointing import Checkpointing
from lightning_gemini.core import DtypePolicy


class AsyncSaves:
    """A trained model, and saves of it that training waits for only until there is a copy.

    Attributes:
        engine: of the model.
    """

    def __init__(self, workload: Workload, policy: DtypePolicy) -> None:
        self._model, self.engine = trained(workload, policy)
        (self._optimizer,) = (chunks.optimizer for chunks in self.engine.optimizers)
        self._group = dist.new_group() if dist.get_world_size() > 1 else None
        self._checkpoints = Checkpointing("sharded", in_background=True, frozen=True)
        self._checkpoints.begin(fingerprint(self._model, [self._optimizer], policy))
        self._checkpoints.attach(self.engine, self._group, datamodule=None)

    def start(self, path: Path) -> None:
        """All that training waits for."""
        state = self._checkpoints.model_state(self.engine, self._model)
        states = [self._checkpoints.optimizer_state(self.engine, self._optimizer)]
        checkpoint = {"state_dict": state, "optimizer_states": states, "epoch": 0, "global_step": 1}
        self._checkpoints.prepare(checkpoint, path, failed=False)()

    def wait(self) -> None:
        """Until the save is on the disk."""
        self._checkpoints.wait()

    def forget(self) -> None:
        """Gives the memory of the copy back, so that the next save is a first one again."""
        self._checkpoints.close(failed=False, parted=False)
        self._checkpoints.attach(self.engine, self._group, datamodule=None)

    def parts(self) -> list[Tensor]:
        """What a save copies: the tensors that weights, masters and states lie in, each once."""
        flats = flat_tensors(self.engine).values()
        sources = dict.fromkeys(run.source for flat in flats for run in flat.runs)
        return [part for source in sources for part in source.parts]
