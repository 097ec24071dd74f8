"""Updates in the background under a Trainer: nothing stale, nobody left waiting, no thread left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gemini import GeminiStrategy, ShardedWeightAveraging
from lightning_gemini.core import GeminiError
from tests.background import as_late_as_possible, before_updates, threads
from tests.lightning_cases import Module, as_file, dataset, loader, on_ranks, trainer
from tests.outcomes import check, rank, ranks
from tests.ranks import run_ranks
from tests.test_mixed import assert_same_bits

pytestmark = pytest.mark.usefixtures("engines")


class Ruled(Module):
    """With an optimizer whose updates are made in the background."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def strategy(overlap: bool, **settings: Any) -> GeminiStrategy:
    return GeminiStrategy(**{"placement": "host", "chunk_size": 2048, **settings}, overlap=overlap)


class Watches(Callback):
    """Reads the weights after each batch, as a user may."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.background = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        with trainer.strategy.summon_full_params():
            self.seen.append([param.detach().clone() for param in pl_module.parameters()])
        self.background = trainer.strategy.engine.store.host_updates.count

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(trainer.callback_metrics["val_loss"].clone())


def fitted(overlap: bool, folder: Path, averaged: bool = False, **settings: Any) -> Any:
    watches, module = Watches(), Ruled("Mlp")
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    callbacks = [watches, saver, *([ShardedWeightAveraging(0.8)] if averaged else [])]
    run = trainer(strategy(overlap), callbacks=callbacks, enable_checkpointing=True, val_check_interval=1, **settings)
    run.fit(module, loader(), loader())
    assert bool(watches.background) == overlap
    assert threads() == []
    saved = []
    for path in sorted(folder.glob("*.ckpt")) if rank() == 0 else ():
        checkpoint = torch.load(as_file(path), weights_only=False)
        saved.append([checkpoint["state_dict"], checkpoint["optimizer_states"]])
    assert rank() or len(saved) >= 10 // settings.get("accumulate_grad_batches", 1)
    return [watches.seen, saved, module.losses, [param.detach().clone() for param in module.parameters()]]


SETTINGS: dict[str, dict[str, Any]] = {
    "clipped": {"gradient_clip_val": 0.05},
    "averaged, with masters": {"averaged": True, "precision": "bf16-mixed"},
    "accumulated": {"accumulate_grad_batches": 2},
}


def _nothing_is_stale(name: str, folder: Path) -> None:
    if ranks() > 1:
        on_ranks()
    with as_late_as_possible():
        late = fitted(True, folder / "late", **SETTINGS[name])
    assert_same_bits(late, fitted(False, folder / "at once", **SETTINGS[name]))


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_stale(name: str, tmp_path: Path) -> None:
    _nothing_is_stale(name, tmp_path)


def test_nothing_is_stale_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(_nothing_is_stale, 2, "averaged, with masters", tmp_path)


def _fails_on_one_rank() -> tuple[str, list[str]]:
    on_ranks()
    module, updates = Ruled("Mlp"), []

    def fail(chunk: int) -> None:
        updates.append(chunk)
        if rank() == 1 and len(updates) == 10:
            raise ZeroDivisionError("in the kernel")

    with before_updates(fail), pytest.raises(GeminiError) as caught:
        trainer(strategy(True), max_epochs=4).fit(module, loader())
    assert all(param.isnan().all() for param in module.parameters()), "no weights of two steps at once"
    return str(caught.value), threads()


def test_a_failure_ends_all_ranks_with_its_words() -> None:
    for said, left in run_ranks(_fails_on_one_rank, 2):
        assert "failed in the background: ZeroDivisionError: in the kernel" in said
        assert left in ([], ["gemini-wait"])


class Interrupted(Ruled):
    """Somebody presses Ctrl-C while an update is under way."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


class Raises(Ruled):
    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 3:
            raise ValueError("in a hook")


class Ends(Ruled):
    """The last batch is the third."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.should_stop = self.trainer.global_step == 3


@pytest.mark.parametrize(("make", "error"), [(Interrupted, (KeyboardInterrupt, SystemExit)), (Raises, ValueError)])
def test_a_run_that_is_cut_off(make: Callable[[], Module], error: Any) -> None:
    module = make()
    with as_late_as_possible(), pytest.raises(error):
        trainer(strategy(True)).fit(module, loader())
    assert threads() == []
    plain = Ends()
    trainer(strategy(False), min_epochs=0).fit(plain, loader())
    assert_same_bits(list(module.parameters()), list(plain.parameters()))


def test_no_thread_where_all_is_on_the_device() -> None:
    seen: list[str] = []
    module = Ruled("Mlp")
    module.on_train_batch_end = lambda *_: seen.extend(threads())
    trainer(strategy(True, placement="device")).fit(module, loader())
    assert seen == []


def test_loaders_that_fork_while_an_update_is_under_way() -> None:
    """The second epoch's processes are forked when the first epoch's last update has not begun."""
    results = []
    for overlap in (True, False):
        module = Ruled("Mlp")
        batches = DataLoader(dataset(), batch_size=4, num_workers=1, multiprocessing_context="fork")
        with before_updates(lambda _: time.sleep(0.02)):
            trainer(strategy(overlap)).fit(module, batches)
        results.append([module.losses, [param.detach().clone() for param in module.parameters()]])
        assert threads() == []
    assert_same_bits(*results)


def _a_slow_rank() -> None:
    """The updates of one rank alone are slow: the ranks gather in one order all the same."""
    on_ranks()
    results: list[list[Tensor]] = []
    for overlap in (True, False):
        with before_updates(lambda _: time.sleep(0.01 * rank())):
            module = Ruled("Mlp")
            trainer(strategy(overlap)).fit(module, loader(), loader())
        results.append([*module.parameters()])
    assert_same_bits(*results)


def _a_slow_rank_without_prefetch() -> None:
    on_ranks()
    with before_updates(lambda chunk: time.sleep(0.01 * ((chunk + rank()) % 2))):
        trainer(strategy(True, prefetch=0)).fit(Ruled("Mlp"), loader())
        trainer(strategy(True, placement="auto", device_memory="90KiB")).fit(Ruled("Mlp"), loader())


SCENARIOS = [_a_slow_rank, _a_slow_rank_without_prefetch]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_slow_rank(scenario: Callable[[], None]) -> None:
    check(scenario, SCENARIOS, 2)
