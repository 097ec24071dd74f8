"""Runs under a Trainer that save and go on from it, what they have to agree in, and writes that a test holds back."""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import shutil
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_gemini import GeminiStrategy, ShardedWeightAveraging
from lightning_gemini.checkpoint.background import BackgroundSaves
from lightning_gemini.checkpoint.local import LocalFolder
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.checkpoint.saving import ShardedSave
from tests.lightning_cases import Module, loader, on_ranks, trainer
from tests.outcomes import rank, ranks

PATIENCE = 20.0

STRATEGIES: dict[str, dict[str, Any]] = {
    "kept": {"chunk_size": 1024},
    "host": {"placement": "host", "device_memory": "64KiB", "chunk_size": 1024},
    "in the background": {"placement": "host", "device_memory": "64KiB", "chunk_size": 1024, "async_save": True},
}
BACKGROUND = STRATEGIES["in the background"]


def assert_same(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder, the same one on all ranks. Around what a scenario does: if it fails on one rank it does on all."""
    if ranks() > 1:
        on_ranks()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    name = together(tempfile.mkdtemp() if rank() == 0 else "")[0]
    word = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield Path(name)
        except BaseException:
            word = traceback.format_exc()
            print(f"rank {rank()}: {word}")  # in case that another rank never comes here
            raise
        finally:
            words = together(word)
            if rank() == 0:
                shutil.rmtree(name)
    assert not any(words), f"it failed on another rank: {words}"


def whole(run: L.Trainer) -> tuple[Any, ...]:
    """Weights, optimizer states, schedulers and averages of a run under way, on rank 0."""
    strategy, module = run.strategy, run.lightning_module
    states = [copy.deepcopy(strategy.engine.optimizer_state_dict(one)) for one in run.optimizers]
    averages = [one for one in run.callbacks if isinstance(one, ShardedWeightAveraging)]
    means = [(one._average.gather(), copy.deepcopy(one._buffers), one._updates) for one in averages if one._average]
    means = means if run.is_global_zero else []  # each rank has buffers of its own, and rank 0's are saved
    with strategy.engine.summon(rank0_only=True, exact=True):
        weights = copy.deepcopy(dict(module.state_dict())) if run.is_global_zero else {}
    return weights, states, copy.deepcopy([config.scheduler.state_dict() for config in run.lr_scheduler_configs]), means


class Note(Callback):
    """Keeps the state that a run begins with, and the one that it is saved at, in ``hook`` after so many steps."""

    def __init__(self, path: Path | None = None, at: int = 2, hook: str = "on_train_batch_end", **options: Any) -> None:
        self.path, self.at, self.options = path, at, options
        self.begun: Any = None
        self.saved: Any = None
        if path is not None:
            setattr(self, hook, self.save)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = whole(trainer)

    def save(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.at and self.saved is None:
            self.saved = whole(trainer)
            trainer.save_checkpoint(self.path, **self.options)


class Norms(Module):
    """Batch norms, whose buffers change in each forward, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__("ConvNet")
        next(self.model.parameters()).requires_grad_(False)


class Calls(Callback):
    """Calls a function at the end of a step."""

    def __init__(self, **calls: Callable[[L.Trainer], object]) -> None:
        self.calls = {int(step.removeprefix("step_")): call for step, call in calls.items()}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.calls:
            self.calls[trainer.global_step](trainer)


def resumed(path: Path, module: L.LightningModule, *callbacks: Callback, **settings: Any) -> Any:
    """The state that a run begins with that goes on from ``path``; it takes one step more."""
    note, strategy = Note(), settings.pop("strategy", None) or GeminiStrategy(chunk_size=2048)
    batches = settings.pop("batches", None) or loader(getattr(module, "name", "Mlp"))
    run = trainer(strategy, callbacks=[*callbacks, note], **{"limit_train_batches": 1, **settings})
    run.fit(module, batches, ckpt_path=path)
    return note.begun


def step_of(path: Path) -> int:
    """The step at which a sharded checkpoint was saved."""
    return int(CheckpointReader(path).manifest.about["global_step"])


class Gate:
    """Writes in the background wait for it; ``words`` are what has happened, in that order."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._opened = threading.Event()

    def open(self, after: float = 0.0) -> None:
        if after:
            threading.Timer(after, self.open).start()
        else:
            self.words.append("opened")
            self._opened.set()

    def wait(self) -> None:
        assert self._opened.wait(PATIENCE)


@contextlib.contextmanager
def held_back(after: int = 0) -> Iterator[Gate]:
    """Holds writes in the background back until the gate is opened, but for so many first ones."""
    gate, write, copy_all = Gate(), ShardedSave.write, BackgroundSaves._copy_all

    def held(save: ShardedSave, path: Any, *rest: Any) -> None:
        assert threading.current_thread().name == "gemini-save"
        gate.words.append(f"begins {Path(path).name}")
        if sum(word.startswith("begins") for word in gate.words) > after:
            gate.wait()
        write(save, path, *rest)
        gate.words.append(f"ends {Path(path).name}")

    def copied(saves: BackgroundSaves, *rest: Any) -> None:
        copy_all(saves, *rest)
        gate.words.append("copied")

    with mock.patch.object(ShardedSave, "write", held), mock.patch.object(BackgroundSaves, "_copy_all", copied):
        try:
            yield gate
        finally:
            gate._opened.set()


@contextlib.contextmanager
def full_disk(late: float = 0.0) -> Iterator[Callable[[], None]]:
    """Gives what fills the disk of the last rank; a write in the background ends so many seconds ``late`` there."""
    write, create, full = ShardedSave.write, LocalFolder.create, threading.Event()

    def failing(folder: LocalFolder, name: str) -> Any:
        if full.is_set() and rank() == ranks() - 1:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        return create(folder, name)

    def slow(save: ShardedSave, *rest: Any) -> None:
        try:
            write(save, *rest)
        finally:
            if threading.current_thread().name == "gemini-save" and rank() == ranks() - 1:
                time.sleep(late)

    with mock.patch.object(LocalFolder, "create", failing), mock.patch.object(ShardedSave, "write", slow):
        yield full.set


def raised(call: Callable[[], Any]) -> BaseException:
    """What ``call`` raises."""
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def together(value: Any) -> list[Any]:
    """Every rank's ``value``."""
    values: list[Any] = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(values, value)
    return values
