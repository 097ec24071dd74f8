"""Averages of the weights over steps (EMA, SWA), on shards."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_gemini.checkpoint.state import flat_average
from lightning_gemini.core import ConfigurationError
from lightning_gemini.core.average import ShardAverage
from lightning_gemini.strategy import GeminiStrategy


class ShardedWeightAveraging(Callback):
    """Keeps an average of the weights in fp32 shards, validates with it and leaves it in the model after ``fit``.

    The average is what ``torch.optim.swa_utils.AveragedModel`` computes with ``use_buffers=True``: a copy of the
    weights at first, then ``decay * average + (1 - decay) * weights`` (an exponential moving average), or with
    ``decay=None`` the mean of all of them (Izmailov et al., stochastic weight averaging, arXiv:1803.05407). It takes 4
    bytes per trained parameter, divided by the number of ranks, and is saved and resumed with the checkpoint. Buffers
    of integers, which count, are copied.

    Args:
        decay: Between 0 and 1; ``None`` for the mean.
        start_step: Optimizer steps before the first update.
        every_n_steps: Optimizer steps from one update to the next.
        validate: Whether validation runs with the average.

    Raises:
        ConfigurationError: A setting cannot work.
    """

    def __init__(
        self, decay: float | None = 0.999, start_step: int = 0, every_n_steps: int = 1, validate: bool = True
    ) -> None:
        if decay is not None and not 0 <= decay <= 1:
            raise ConfigurationError(f"decay must be between 0 and 1, or None for the mean, got {decay!r}.")
        if start_step < 0 or every_n_steps < 1:
            raise ConfigurationError(
                f"start_step must be 0 or more and every_n_steps 1 or more, got {start_step!r} and {every_n_steps!r}."
            )
        self.decay, self.start_step, self.every_n_steps, self.validate = decay, start_step, every_n_steps, validate
        self._strategy: GeminiStrategy | None = None
        self._average: ShardAverage | None = None
        self._buffers: dict[str, Tensor] = {}
        self._hidden_buffers: dict[str, Tensor] | None = None
        self._updates = self._seen = 0
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, GeminiStrategy):
            raise ConfigurationError(
                f"ShardedWeightAveraging averages the shards of the gemini strategy, but the trainer has "
                f"{type(trainer.strategy).__name__}. Use lightning.pytorch.callbacks.WeightAveraging there."
            )
        self._strategy = trainer.strategy

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._average = trainer.strategy.engine.average()
        self._buffers = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}
        self._updates, self._seen = 0, trainer.global_step
        if self._loaded is not None:
            self._updates = self._loaded["updates"]
            self._average.load(self._loaded["weights"])
            for name, buffer in self._buffers.items():
                buffer.copy_(self._loaded["buffers"][name])
            self._loaded = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen:
            return  # accumulating
        self._seen = step
        if step > self.start_step and (step - self.start_step) % self.every_n_steps == 0:
            self._update(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.validate and self._updates and self._average is not None:
            self._show(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._hidden_buffers is not None and self._average is not None:
            self._average.restore()
            self._put(pl_module, self._hidden_buffers)
            self._hidden_buffers = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._average is not None
        if self._updates:
            self._show(pl_module)
        self._average.release()
        self._average, self._hidden_buffers = None, None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._average is None:
            return
        if self._hidden_buffers is not None:
            self._put(pl_module, self._hidden_buffers)
            if trainer.world_size == 1:
                self._average.restore()
            else:
                trainer.strategy.engine.tear()
        self._average.abandon()
        self._average, self._hidden_buffers = None, None

    def state_dict(self) -> dict[str, Any]:
        """The average, whole on rank 0 or spread over the ranks as the checkpoint is; every rank has to call."""
        if self._average is None or self._strategy is None:
            return {}
        weights = flat_average(self._strategy.engine.store, self._average) if self._strategy.saves_shards else None
        return {
            "updates": self._updates,
            "weights": self._average.gather() if weights is None else weights,
            "buffers": {name: buffer.clone() for name, buffer in self._buffers.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

    @torch.no_grad()
    def _update(self, module: L.LightningModule) -> None:
        assert self._average is not None
        self._updates += 1
        # the first update copies, as AveragedModel does
        weight = 1.0 if self._updates == 1 else 1 / self._updates if self.decay is None else 1 - self.decay
        self._average.update(weight)
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                self._buffers[name].lerp_(buffer, weight)
            else:
                self._buffers[name].copy_(buffer)

    def _show(self, module: L.LightningModule) -> None:
        assert self._average is not None
        self._average.apply()
        self._hidden_buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        self._put(module, self._buffers)

    @torch.no_grad()
    def _put(self, module: L.LightningModule, values: dict[str, Tensor]) -> None:
        for name, buffer in module.named_buffers():
            buffer.copy_(values[name])
