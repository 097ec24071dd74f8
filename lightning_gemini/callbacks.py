"""Callbacks that tell how a run is doing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_gemini.data import data_replicas
from lightning_gemini.strategy import GeminiStrategy


class MemoryReport(Callback):
    """Prints the chunks when training starts, and keeps what they took for :attr:`text` when it ends.

    Does nothing under another strategy than gemini.
    """

    def __init__(self) -> None:
        self.text: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.strategy, GeminiStrategy) and trainer.is_global_zero:
            print(trainer.strategy.engine.layout, flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.strategy, GeminiStrategy):
            self.text = trainer.strategy.engine.memory_report()
            if trainer.strategy.engine.moving and (folder := trainer.log_dir) is not None:  # a broadcast
                self.text += f"\na step as a picture: lightning-gemini report {folder}"


class TokensPerSecond(Callback):
    """Shows training tokens per second, over all ranks, in the progress bar and the loggers.

    Only the clock is read in a step, so on a GPU the figure counts steps as they are launched; over more
    steps than it queues that is the same. Validation and the first steps are left out. All ranks are taken
    to have batches of equal size.

    Args:
        key: Entry of the batch whose elements are the tokens.
        warmup_steps: First batches that are left out: they allocate, compile and record.
    """

    def __init__(self, key: str = "input_ids", warmup_steps: int = 5) -> None:
        self.key = key
        self.warmup_steps = warmup_steps
        self._forget()

    @property
    def tokens_per_second(self) -> float | None:
        """Mean rate of the latest fit so far; None before its warm-up is over."""
        return self._tokens / self._seconds if self._seconds else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()
        self._replicas = data_replicas(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._batches += 1
        if self._batches > max(1, self.warmup_steps):  # at least one, whose end starts the clock
            self._tokens += self._count(batch) * self._replicas
            self._seconds += now - self._last
            # A tensor on the host stays there; a float would be copied to the device, which waits for it.
            rate = torch.tensor(self._tokens / self._seconds, device="cpu")
            pl_module.log("tokens_per_s", rate, prog_bar=True, on_step=True, on_epoch=False)
        self._last = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last = time.perf_counter()

    def _forget(self) -> None:
        self._batches = self._tokens = 0
        self._seconds = self._last = 0.0
        self._replicas = 1

    def _count(self, batch: Any) -> int:
        if not isinstance(batch, Mapping) or self.key not in batch:
            found = f"the keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"TokensPerSecond counts the elements of batch[{self.key!r}], but the batch has {found}. "
                "Name the entry that holds the tokens with key, or leave the callback out."
            )
        return batch[self.key].numel()
