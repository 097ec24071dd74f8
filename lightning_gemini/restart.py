"""Lightning's loops after a restart: they go on where an uninterrupted run would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops import _Loop
from lightning.pytorch.loops.evaluation_loop import RestartStage as EvaluationStage
from lightning.pytorch.loops.training_epoch_loop import RestartStage as EpochStage


def batches_remain(trainer: L.Trainer) -> bool:
    """Whether the next training batch comes from the iterator that there is now."""
    fit_loop = trainer.fit_loop
    if fit_loop._data_fetcher is None or fit_loop._data_fetcher.iterator is None:
        return False
    progress = fit_loop.epoch_loop.batch_progress
    if trainer.current_epoch == 0 and progress.total.ready == 0:
        return True  # the first iterator is made before the first epoch
    return not fit_loop.epoch_loop._num_ready_batches_reached()


def prepare(checkpoint: Mapping[str, Any], remain: bool) -> bool:
    """Changes the progress in ``checkpoint`` so that Lightning comes back to the place of the save.

    - An epoch that was cut short, by ``max_steps`` or ``max_time``, is under way.
    - A save in ``on_train_batch_end`` of an epoch's last batch was after that batch. Lightning would go on with the
      next epoch, without the validation and without the hooks at the end of this one.

    Args:
        checkpoint: of Lightning, as it was loaded.
        remain: whether the epoch has batches left.

    Returns:
        whether the epoch still has to end, and its validation, if there is one, has not been yet.
    """
    state = checkpoint.get("loops", {}).get("fit_loop", {})
    if not {"epoch_progress", "epoch_loop.batch_progress"} <= state.keys():
        return False
    epoch, batch = state["epoch_progress"], state["epoch_loop.batch_progress"]
    if remain and epoch["total"]["processed"] == epoch["total"]["started"] > 0:
        for count in (epoch["total"], epoch["current"]):
            count["processed"] = count["completed"] = count["started"] - 1
    total = batch["total"]
    inside = total["ready"] == total["started"] == total["processed"] == total["completed"] + 1
    if not inside or not batch["is_last_batch"]:
        return False
    for count in (total, batch["current"]):
        count["completed"] += 1
    return True


def restart(trainer: L.Trainer, remain: bool, ending: bool, metrics: bool) -> None:
    """Sets the loops so that they go on at the place of the save; in ``on_train_start``.

    Args:
        remain: whether the epoch has batches left.
        ending: what :func:`prepare` has returned.
        metrics: whether the metrics of the save are there, which Lightning does not save. It updates no scheduler that
            needs them at the end of the epoch that it goes on with.
    """
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    if not fit_loop.restarted_mid_epoch:
        _begin_epoch(trainer, metrics)
        return
    if metrics:
        fit_loop._restarting = False
    if not remain and not ending:
        return
    validates = epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
    if ending and not validates:
        _exhaust(fit_loop._data_fetcher)
        epoch_loop._batches_that_stepped += 1
    elif validates and (ending or epoch_loop.restarted_on_train_batch_end):
        # Lightning would skip the validation that follows the batch of the save
        if not ending:
            epoch_loop.batch_progress.increment_completed()
            epoch_loop._restart_stage = EpochStage.RESTARTED_ON_LAST
        epoch_loop.val_loop._restarting = False
        epoch_loop.val_loop._restart_stage = EvaluationStage.RESTARTED_MID_EVALUATION


def _begin_epoch(trainer: L.Trainer, metrics: bool) -> None:
    """The last epoch is over, the next one begins like any other, with an iterator of its own."""
    fit_loop = trainer.fit_loop
    ended = fit_loop.restarted_on_epoch_end or fit_loop.resumed_on_epoch_end
    if fit_loop.restarted_on_epoch_end:  # with max_steps Lightning would go through the end of the epoch again
        fit_loop.epoch_progress.increment_completed()
        fit_loop.reset_restart_stage()
    if fit_loop.restarted_on_epoch_start:  # Lightning has taken this one back, and will not count it again
        fit_loop.epoch_progress.current.ready += 1
    if ended and metrics and fit_loop.epoch_loop._num_ready_batches_reached():
        fit_loop.epoch_progress.current.completed -= 1  # the number of the epoch that ends
        fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        fit_loop.epoch_progress.current.completed += 1
    _Loop.restarting.fset(fit_loop, False)
    fit_loop._resuming_from_checkpoint = False


def _exhaust(fetcher: Any) -> None:
    """The epoch has no batches any more, and ends when the next one is asked for."""
    fetcher.reset()
    fetcher.iterator, fetcher.done = iter(()), True


def set_epoch(trainer: L.Trainer) -> None:
    """Tells the samplers the epoch, which Lightning does after it has made their iterators."""
    for loader in trainer.fit_loop._combined_loader.flattened:
        _set_sampler_epoch(loader, trainer.fit_loop.epoch_progress.current.processed)
