"""Checkpoints as Lightning asks a strategy for them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gemini.checkpoint.automatic import choose
from lightning_gemini.checkpoint.io import GeminiCheckpointIO
from lightning_gemini.checkpointing import EXTRA, Checkpointing
from lightning_gemini.core import ConfigurationError, Engine
from lightning_gemini.core.errors import ended_together
from lightning_gemini.ranks import RankStrategy
from lightning_gemini.resumption import Resumption


class CheckpointStrategy(RankStrategy):
    """A strategy whose engine saves and loads; see :class:`Checkpointing` and :class:`Resumption`."""

    _checkpoint_io: CheckpointIO | None

    def __init__(self, *ranks: Any, checkpoints: Checkpointing, resumption: Resumption) -> None:
        super().__init__(*ranks)
        self._checkpoints = checkpoints
        self._resumption = resumption
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine of the run under way.

        Raises:
            RuntimeError: there is none, before ``setup`` and after ``teardown``.
        """
        if self._engine is None:
            raise RuntimeError("the engine exists only while the Trainer runs: from its setup to its teardown")
        return self._engine

    @property
    def saves_shards(self) -> bool:
        """Whether checkpoints are folders that all ranks write; a CheckpointIO of another kind gets whole ones."""
        own = isinstance(self.checkpoint_io, GeminiCheckpointIO)
        return own and self._checkpoints.state_dict_type == "sharded"

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = GeminiCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = GeminiCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    @override
    def checkpoint_io(self, checkpoint_io: CheckpointIO | None) -> None:
        self._checkpoint_io = checkpoint_io

    @property
    def _trainer(self) -> L.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        if self._engine is None:
            return self._checkpoints.model_state_after(self.lightning_module, self.saves_shards)
        if self.saves_shards:
            return self._checkpoints.model_state(self._engine, self.lightning_module)
        return self._checkpoints.whole_model_state(self._engine, self.lightning_module, self.is_global_zero)

    @override
    def exchange(self, value: Any) -> list[Any]:
        return self._checkpoints.exchange_after_failure(value) if self.parted else super().exchange(value)

    @property
    @override
    def parted(self) -> bool:
        if self._engine is None:
            return False
        error = sys.exc_info()[1]
        if error is not None and self._trainer.interrupted and not ended_together(error):
            # in on_exception: the others wait for this rank, and are to fail as well, so that all of them save
            self._engine.leave(error)
        return self._engine.store.collectives.parted

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        if self._engine is None:
            return self._checkpoints.optimizer_state_after(self.optimizers.index(optimizer), self.saves_shards)
        if self.saves_shards:
            return self._checkpoints.optimizer_state(self._engine, optimizer)
        return self.engine.optimizer_state_dict(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        checkpoint[EXTRA] = {**checkpoint.get(EXTRA, {}), **self._checkpoints.extra()}
        if not self.saves_shards:
            with self.on_all_ranks():
                super().save_checkpoint(checkpoint, self.broadcast(filepath), storage_options)
            return
        if storage_options is not None:
            raise ConfigurationError(
                "storage_options are for a CheckpointIO of your own; sharded checkpoints have none."
            )
        failed = self.parted
        with nullcontext() if failed else self.explains(f"the checkpoint {filepath}"):
            with nullcontext() if failed else self.on_all_ranks():
                write = self._checkpoints.prepare(checkpoint, filepath, failed)
            write()

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        if self.is_global_zero:
            self._checkpoints.remove(partial(self.checkpoint_io.remove_checkpoint, filepath))

    @override
    def on_train_end(self) -> None:
        self._checkpoints.wait()

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        path = checkpoint_path
        if isinstance(self.checkpoint_io, GeminiCheckpointIO):
            path = choose(path, self._last_checkpoints(), self.global_rank, self.exchange)
        with self.on_all_ranks():
            checkpoint = self._resumption.load(path, self.checkpoint_io, weights_only)
        fitting = self.lightning_module is None or self._trainer.state.fn == TrainerFn.FITTING
        return self._resumption.take(checkpoint, path, fitting)

    def _last_checkpoints(self) -> set[object]:
        """What ckpt_path="last" may have stood for; Lightning hands on nothing but the path that it has found."""
        if self.lightning_module is None:
            return set()
        callbacks = [one for one in self._trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        return set().union(*(one._find_last_checkpoints(self._trainer) for one in callbacks))

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        with nullcontext() if self._engine is None else self._engine.loading() as fill:
            with self.on_all_ranks():
                weights = self._resumption.note_model(self.lightning_module, checkpoint, strict)
            if fill is None:
                self._resumption.loaded = weights
            else:
                fill(weights)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._resumption.load_optimizers(self.engine, self.optimizers, checkpoint)
