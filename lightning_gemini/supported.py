"""What of Lightning cannot work on chunks: refused by name, before training."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback

from lightning_gemini.core import ConfigurationError

_REFUSED: dict[type[Callback], str] = {
    callbacks.WeightAveraging: (
        "it averages whole parameters, which are spread over chunks during training. Use "
        "lightning_gemini.ShardedWeightAveraging, which averages the shards"
    ),
    callbacks.StochasticWeightAveraging: (
        "it averages and exchanges whole parameters, which are spread over chunks during training. Use "
        "lightning_gemini.ShardedWeightAveraging with start_step, and a scheduler for the learning rate"
    ),
    callbacks.ModelPruning: (
        "it replaces parameters by masked ones during training, after the chunks were laid out. Prune before fit, with "
        "torch.nn.utils.prune and prune.remove"
    ),
    callbacks.BaseFinetuning: (
        "it adds parameter groups to the optimizer during training, after the chunks were laid out. Give the optimizer "
        "all parameters in configure_optimizers, freeze with requires_grad_(False), and unfreeze with "
        "requires_grad_(True) in on_train_epoch_start: a frozen parameter takes no optimizer state until then"
    ),
}


def require_supported(given: Iterable[Callback]) -> None:
    """Raises ConfigurationError for a callback that would train wrongly, with what to use in its place."""
    for callback in given:
        for refused, reason in _REFUSED.items():
            if isinstance(callback, refused):
                raise ConfigurationError(
                    f"the gemini strategy cannot run the callback {type(callback).__name__}: {reason}."
                )


def require_no_waiting_gradients(trainer: L.Trainer) -> None:
    """Raises ConfigurationError for settings that need all gradients of a step, or more, before the first update."""
    scheduled = any(isinstance(callback, callbacks.GradientAccumulationScheduler) for callback in trainer.callbacks)
    for what, given in (
        (f"accumulate_grad_batches={trainer.accumulate_grad_batches}", trainer.accumulate_grad_batches != 1),
        ("the callback GradientAccumulationScheduler", scheduled),
        (f"gradient_clip_val={trainer.gradient_clip_val}", trainer.gradient_clip_val),
    ):
        if given:
            raise ConfigurationError(
                f"update='in_backward' cannot work with {what}: it uses and drops each gradient as soon as it is "
                "there, before the others are known. Use update='at_step'."
            )
