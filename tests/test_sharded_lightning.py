"""Sharded checkpoints through a Trainer: at any moment of a run, after it, and when it fails."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_gemini import GeminiStrategy, checkpointing
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.core import ConfigurationError, StateError
from lightning_gemini.core.errors import (
    CheckpointWriteError,
    PeerError,
    StepFailedError,
)
from tests.lightning_cases import Module, loader, trainer
from tests.outcomes import check, rank, ranks
from tests.saved_runs import (
    BACKGROUND,
    STRATEGIES,
    Calls,
    Note,
    assert_same,
    held_back,
    raised,
    resumed,
    shared_folder,
    step_of,
)

SCENARIOS: list[Callable[[], None]] = []


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS.append(function)
    return function


PLANS = [("kept", "32-true"), ("kept", "bf16-mixed"), ("host", "bf16-mixed"), ("in the background", "bf16-true")]


@scenario
def a_run_begins_where_the_other_was_saved() -> None:
    for number, (name, precision) in enumerate(PLANS):
        with shared_folder() as folder:
            note, others = Note(folder / "a"), {"chunk_size": 2048} if number % 2 else STRATEGIES["host"]
            run = trainer(GeminiStrategy(**STRATEGIES[name]), precision=precision, callbacks=[note], max_steps=3)
            run.fit(Module(), loader())
            begun = resumed(folder / "a", Module(), strategy=GeminiStrategy(**others), precision=precision)
            assert_same(begun, note.saved)


# At other moments

WITHIN_A_STEP = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]
BETWEEN = [
    "on_train_batch_end", "on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end",
    "on_train_end",
]  # fmt: skip


@scenario
def a_save_is_possible_at_any_moment_but_in_a_forward_or_a_backward() -> None:
    with shared_folder() as folder:
        notes = [Note(folder / hook, 1 if hook in WITHIN_A_STEP else 2, hook) for hook in (*WITHIN_A_STEP, *BETWEEN)]
        settings = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1, "limit_train_batches": 2}
        saving, plain = Module(), Module()
        for module, callbacks in ((saving, notes), (plain, [])):
            run = trainer(GeminiStrategy(**STRATEGIES["host"]), callbacks=callbacks, **settings)
            run.fit(module, loader(), loader())
        assert_same(saving.state_dict(), plain.state_dict())
        for note in notes:
            assert_same(resumed(note.path, Module(), max_steps=4), note.saved)


class SavesInside(Module):
    """Saves in its forward."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        error = raised(lambda: self.trainer.save_checkpoint("nowhere"))
        assert isinstance(error, StateError)
        assert "cannot save a checkpoint inside a forward or a backward" in str(error)
        return loss


@scenario
def within_accumulation() -> None:
    class Third(Note):
        batches = 0

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.batches += 1
            if self.batches == 3:  # in the second window
                self.save(trainer)

    with shared_folder() as folder:
        note, settings = Third(at=1), {"accumulate_grad_batches": 2, "max_steps": 3}
        note.path = folder / "a"
        saving, plain = SavesInside(), Module()
        for module, callbacks in ((saving, [note]), (plain, [])):
            run = trainer(GeminiStrategy(**STRATEGIES["host"]), callbacks=callbacks, **settings)
            run.fit(module, loader())
        assert_same(saving.state_dict(), plain.state_dict())
        assert_same(resumed(note.path, Module(), **settings, limit_train_batches=6), note.saved)


# After the run, and before any


def weights_of(module: L.LightningModule) -> dict[str, Tensor]:
    """The model's state where :func:`whole` has it."""
    return dict(module.state_dict()) if rank() == 0 else {}


@scenario
def after_the_run() -> None:
    for precision, settings in (("32-true", STRATEGIES["kept"]), ("bf16-mixed", BACKGROUND)):
        with shared_folder() as folder:
            note, module, never = Note(folder / "in", 3), Module(), trainer(GeminiStrategy())
            assert "before calling" in str(raised(lambda run=never: run.save_checkpoint(folder / "before")))
            run = trainer(GeminiStrategy(**settings), precision=precision, callbacks=[note], max_steps=3)
            run.fit(module, loader())
            run.save_checkpoint(folder / "after")
            run.save_checkpoint(folder / "weights", weights_only=True)
            assert not any("optim" in name for name in CheckpointReader(folder / "weights").manifest.tensors)
            with torch.no_grad():
                next(module.parameters()).add_(1)
            run.save_checkpoint(folder / "changed")
            assert_same(resumed(folder / "in", Module(), precision=precision), note.saved)
            assert_same(resumed(folder / "after", Module(), precision=precision), note.saved)
            changed = (weights_of(module), *note.saved[1:])
            assert_same(resumed(folder / "changed", Module(), precision=precision), changed)
            run.validate(module, loader(), verbose=False)
            run.save_checkpoint(folder / "validated")
            again = partial(resumed, folder / "validated", Module(), precision=precision)
            error = raised(again)
            assert "holds weights alone" in str(error), error
            for name, state in (("validated", changed), ("weights", note.saved)):
                only_weights = GeminiStrategy(resume="weights")
                begun = resumed(folder / name, Module(), precision=precision, strategy=only_weights)
                assert_same(begun[0], state[0])


@scenario
def after_the_run_in_one_file() -> None:
    with shared_folder() as folder:
        note, module = Note(folder / "in.ckpt", 3), Module()
        run = trainer(GeminiStrategy(state_dict_type="full"), callbacks=[note], max_steps=3)
        run.fit(module, loader())
        run.save_checkpoint(folder / "weights.ckpt", weights_only=True)
        begun = resumed(folder / "weights.ckpt", Module(), strategy=GeminiStrategy(resume="weights"))
        assert_same(begun[0], note.saved[0])
        if ranks() > 1:
            error = raised(lambda: run.save_checkpoint(folder / "after.ckpt"))
            assert isinstance(error, ConfigurationError)
            assert "stays on its ranks" in str(error)
        else:
            run.save_checkpoint(folder / "after.ckpt")
            assert_same(resumed(folder / "after.ckpt", Module()), note.saved)


@scenario
def a_state_that_is_gone_is_not_saved() -> None:
    class Computes(Module):
        """Its state has values of its own, which are not there where weights are spread."""

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {key: value.half() for key, value in super().state_dict(*args, **kwargs).items()}

    class Fails(Module):
        def on_train_batch_start(self, *_: Any) -> None:
            if self.trainer.global_step == 2:
                raise ArithmeticError("boom")

    with shared_folder() as folder:
        for module, reason in ((Computes(), "made of weights that are spread over the ranks"), (Fails(), "not failed")):
            run = trainer(GeminiStrategy(**STRATEGIES["host"]), max_steps=3)
            if isinstance(module, Fails):
                assert str(raised(lambda run=run, module=module: run.fit(module, loader()))).endswith("boom")
            else:
                run.fit(module, loader())
            error = raised(lambda run=run: run.save_checkpoint(folder / "a"))
            assert isinstance(error, ConfigurationError), error
            if ranks() == 1 or isinstance(module, Computes):
                assert "the states of optimizers are gone" in str(error)
                assert reason in str(error)
            else:
                assert "the model does not hold its weights" in str(error)
        assert not list(folder.iterdir())


# When a run fails


class FailsOnOneRank(Module):
    """Raises in the fourth step of the last rank: in its forward, or before it."""

    def __init__(self, error: BaseException, hook: str = "training_step") -> None:
        super().__init__()
        self.error, self.hook = error, hook

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.fail("training_step")
        return loss

    def on_train_batch_start(self, *_: Any) -> None:
        self.fail("on_train_batch_start")

    def fail(self, hook: str) -> None:
        if hook == self.hook and self.trainer.global_step == 3 and rank() == ranks() - 1:
            raise self.error


FAILURES = {
    "in a step": ("training_step", ArithmeticError("boom"), ArithmeticError, PeerError),
    "between steps": ("on_train_batch_start", ArithmeticError("boom"), ArithmeticError, PeerError),
    "out of memory": ("training_step", torch.OutOfMemoryError("boom"), StepFailedError, StepFailedError),
    "interrupt": ("training_step", KeyboardInterrupt("boom"), SystemExit, PeerError),
}


@scenario
def the_state_of_a_run_that_fails_is_saved() -> None:
    with shared_folder() as folder:
        note = Note(folder / "steps", 3)
        trainer(GeminiStrategy(), callbacks=[note], max_steps=3).fit(Module(), loader())
        handler = signal.getsignal(signal.SIGINT)
        for number, (name, (hook, error, here, elsewhere)) in enumerate(FAILURES.items()):
            path = folder / name
            savers = [OnExceptionCheckpoint(path, "a"), ModelCheckpoint(path, "a", save_on_exception=True)]
            run = trainer(
                GeminiStrategy(**STRATEGIES["kept"], async_save=number % 2 == 0),
                callbacks=[savers[number // 2]],
                enable_checkpointing=True,
            )
            module = FailsOnOneRank(error, hook)
            found = raised(lambda run=run, module=module: run.fit(module, loader()))
            signal.signal(signal.SIGINT, handler)
            assert isinstance(found, here if rank() == ranks() - 1 else elsewhere), (name, found)
            assert step_of(path / "a.ckpt") == 3
            assert_same(resumed(path / "a.ckpt", Module()), note.saved)


@scenario
def a_rank_that_does_not_come_to_save_is_not_waited_for() -> None:
    class OnRank0(OnExceptionCheckpoint):
        def on_exception(self, trainer: L.Trainer, *rest: Any, **more: Any) -> None:
            if rank() == 0:
                super().on_exception(trainer, *rest, **more)

    if ranks() == 1:
        return
    with shared_folder() as folder, mock.patch.object(checkpointing, "_PATIENCE", timedelta(seconds=0.3)):
        for settings in (STRATEGIES["kept"], BACKGROUND):
            run = trainer(GeminiStrategy(**settings), callbacks=[OnRank0(folder, "a")], enable_checkpointing=True)
            module = FailsOnOneRank(ArithmeticError("boom"), "on_train_batch_start")
            error = raised(lambda run=run, module=module: run.fit(module, loader()))
            assert isinstance(error, CheckpointWriteError if rank() == 0 else ArithmeticError), error
            assert rank() or "the other ranks did not come to save it within 0 s" in str(error), error
        assert not (folder / "a.ckpt").exists()


@scenario
def a_save_that_is_under_way_when_a_run_fails_comes_to_its_end() -> None:
    for hook in ("training_step", "on_train_batch_start"):
        with shared_folder() as folder, held_back() as gate:
            callbacks = [Calls(step_2=lambda run, folder=folder: run.save_checkpoint(folder / "before"))]
            run = trainer(GeminiStrategy(**BACKGROUND), callbacks=callbacks)
            gate.open(after=0.3)
            module = FailsOnOneRank(ArithmeticError("boom"), hook)
            assert "boom" in str(raised(lambda run=run, module=module: run.fit(module, loader())))
            assert step_of(folder / "before") == 2


# Loading while a run is under way


@scenario
def the_learning_rate_finder_puts_everything_back() -> None:
    everything = loader("Mlp", batch_size=4 * ranks())
    torch.set_flush_denormal(True)  # the loss becomes so small that it would take its time
    for settings in (STRATEGIES["kept"], BACKGROUND):
        with shared_folder() as folder:
            module, plain = Module(), Module()
            run = trainer(GeminiStrategy(**settings), default_root_dir=folder, max_epochs=5)
            found = Tuner(run).lr_find(module, everything, max_lr=0.1, num_training=20, early_stop_threshold=None)
            assert found is not None
            assert module.lr == found.suggestion() != 0.01
            assert_same(module.state_dict(), plain.state_dict())
            assert not [path for path in folder.iterdir() if "lr_find" in path.name]
            plain.lr, run.fit_loop.max_epochs = module.lr, 1
            run.fit(module, everything)
            trainer(GeminiStrategy(**settings), max_epochs=1).fit(plain, everything)
            assert_same(module.state_dict(), plain.state_dict())
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("run", SCENARIOS, ids=lambda run: run.__name__)
def test_scenario(run: Callable[[], None], world_size: int) -> None:
    check(run, SCENARIOS, world_size)
