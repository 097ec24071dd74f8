"""Runs that save wherever they come by, and runs that go on from there: all that follows has to be the same."""

from __future__ import annotations

import itertools
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_gemini import GeminiPrecision, GeminiStrategy
from tests.lightning_cases import as_file, trainer
from tests.outcomes import rank

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

WIDTH, LENGTH = 16, 14
#: for ``GeminiStrategy``; what is exact does not depend on the kind of checkpoint, and one file is sooner written
STRATEGY: dict[str, Any] = {"chunk_size": 512, "state_dict_type": "full"}


class Rows(Dataset):
    """Rows with their numbers; ``noisy`` ones draw from each global generator of their process, and from their own."""

    def __init__(self, length: int = LENGTH, noisy: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.values = torch.randn(length, WIDTH, generator=self.generator)
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not self.noisy:
            return self.values[index], index
        noise = random.random() + np.random.rand() + torch.rand(()) + torch.rand(WIDTH, generator=self.generator)
        return self.values[index] + 0.1 * noise, index


class Batches:
    """A loader that looks after itself; its order, drawn when an epoch begins, is a part of its state."""

    def __init__(self, batches: Any, shuffle: bool = True) -> None:
        self.batches, self.shuffle = list(batches), shuffle
        self.order: list[int] = []
        self.at, self.loaded = 0, False

    def __iter__(self) -> Iterator[Any]:
        if not self.loaded:
            self.at, self.order = 0, list(range(len(self.batches)))
            if self.shuffle:
                random.shuffle(self.order)
        self.loaded = False
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        while self.at < len(self.order):
            self.at += 1
            yield self.batches[self.order[self.at - 1]]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "order": list(self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.order, self.loaded = state["at"], list(state["order"]), True


class CountedBatches(Batches):
    def __len__(self) -> int:
        return len(self.batches)


class Net(L.LightningModule):
    """Draws in its forward from each generator, and notes what happens."""

    def __init__(self, make_optimizer: Callable[[Net], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(WIDTH, 24), nn.Dropout(0.3), nn.ReLU(), nn.Linear(24, WIDTH))
        self.make_optimizer = make_optimizer
        self.events: list[Any] = []
        self.moving = False

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self._loss(f"train {index}", batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self._loss(f"validation {index}", batch), sync_dist=True)

    def _loss(self, what: str, batch: Any) -> Tensor:
        parts = [part for part in (batch.values() if isinstance(batch, dict) else [batch]) if part is not None]
        outputs = [self.body(rows + 0.1 * random.random() * np.random.rand()) for rows, _ in parts]
        loss = torch.stack([F.mse_loss(output, torch.ones_like(output)) for output in outputs]).sum()
        if not self.trainer.sanity_checking:
            numbers = [numbers.tolist() for _, numbers in parts]
            self.events.append((what, self.current_epoch, self.global_step, numbers, loss.item()))
        return loss

    def on_train_epoch_start(self) -> None:
        self.events.append(("epoch start", self.current_epoch))

    def on_train_epoch_end(self) -> None:
        self.events.append(("epoch end", self.current_epoch))
        strategy = self.trainer.strategy
        self.moving = isinstance(strategy, GeminiStrategy) and strategy.engine.moving

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


class Logged(DummyLogger):
    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.events = events

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.events.append(("logged", step, dict(metrics)))


class Saves(Callback):
    """Saves in these hooks, and notes how much had happened by then."""

    def __init__(self, folder: Path, *hooks: str) -> None:
        self.folder = folder
        self.marks: dict[Path, int] = {}
        for hook in hooks:
            setattr(self, hook, lambda trainer, module, *_, hook=hook: self._save(hook, trainer, module))

    def _save(self, hook: str, trainer: L.Trainer, module: Net) -> None:
        if trainer.sanity_checking or trainer.fit_loop._should_accumulate():
            return  # gradients are not saved
        path = self.folder / f"{len(self.marks):02}-{hook}-{trainer.current_epoch}-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        self.marks[path] = len(module.events)


def adamw(module: Net) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sgd(module: Net) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def one_cycle(module: Net) -> Any:
    """Asks the Trainer how many batches there are, which has it make their iterator early."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    steps = int(module.trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def batches(shuffle: bool = True, workers: int = 0, noisy: bool = True, **settings: Any) -> DataLoader:
    """Four batches; with noise only where it is this process that draws it."""
    return DataLoader(Rows(noisy=noisy and not workers), 4, shuffle=shuffle, num_workers=workers, **settings)


@dataclass
class Run:
    """How a run is made.

    Attributes:
        train: makes what is trained with, anew for each Trainer.
        optimizer: ``configure_optimizers``.
        strategy: for ``GeminiStrategy``.
        precision: for ``GeminiPrecision``.
        settings: for the Trainer.
        hooks: those that save.
        every: go on from each so manieth save only, and from the last ones of an epoch.
        moving: whether chunks are to move.
    """

    train: Callable[[], Any] = batches
    optimizer: Callable[[Net], Any] = adamw
    strategy: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    hooks: tuple[str, ...] = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")
    every: int = 1
    moving: bool | None = None

    def fit(self, callback: Callback, path: Path | None = None, **settings: Any) -> Net:
        """One run; what it draws before it goes on from a checkpoint is not what other runs draw."""
        seed = rank() + (100 if path else 0)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        module, plugin = Net(self.optimizer), GeminiPrecision(**self.precision)
        run = trainer(
            GeminiStrategy(**{**STRATEGY, **self.strategy}, precision_plugin=plugin),
            logger=Logged(module.events),
            callbacks=[callback],
            default_root_dir=getattr(callback, "folder", None) or (path.parent if path else None),
            **{"log_every_n_steps": 1, "use_distributed_sampler": True, **self.settings, **settings},
        )
        run.fit(module, self.train(), DataLoader(Rows(4), 2), ckpt_path=path, weights_only=path is not None)
        assert path or self.moving in (None, module.moving)
        return module

    def differences(self, folder: Path) -> list[str]:
        """Saves everywhere, goes on from there, and says where something else happened than in the first run."""
        folder.mkdir(exist_ok=True)
        saves, found = Saves(folder, *self.hooks, "on_train_end"), []
        straight = self.fit(saves)
        *paths, end = saves.marks
        for path in paths[:: self.every]:
            expected = after(path, straight.events[saves.marks[path] :])
            if not any(event[0].startswith(("train", "validation")) for event in expected):
                continue  # nothing is left to be done
            last = Saves(folder / path.stem, "on_train_end")
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                events = self.fit(last, path).events
            found += [f"{path.stem}: {w.message}" for w in warned if "ended before the epoch ended" in str(w.message)]
            if text := difference([events, *map(at_the_end, last.marks)], [expected, at_the_end(end)], path.stem):
                found.append(text)
        assert paths
        return found


def trained(events: list[Any]) -> list[Any]:
    """Those of training batches."""
    return [event for event in events if event[0].startswith("train")]


def after(path: Path, events: list[Any]) -> list[Any]:
    """What comes after the moment of the save: without what the Trainer and later hooks still do in that moment."""
    ending = {"on_train_batch_end": {"logged"}, "on_train_epoch_end": {"logged", "epoch end"}}
    kinds = ending.get(path.name.split("-")[1], set())
    return list(itertools.dropwhile(lambda event: event[0] in kinds, events))


def at_the_end(path: Path) -> dict[str, Any]:
    """All that is in a checkpoint that has to be the same: weights, states, progress and random states of all ranks."""
    if rank():
        return {}
    checkpoint = torch.load(as_file(path), weights_only=True)
    del checkpoint["callbacks"]
    checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)  # a loader's own, after its last batch
    return checkpoint


def difference(ours: Any, theirs: Any, where: str = "") -> str:
    """The first place where two trees differ, in words."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return next((text for key in ours if (text := difference(ours[key], theirs[key], f"{where}/{key}"))), "")
    if isinstance(ours, list) and isinstance(theirs, list):
        pairs = enumerate(zip(ours, theirs, strict=False))
        found = next((text for i, pair in pairs if (text := difference(*pair, f"{where}/{i}"))), "")
        return found or ("" if len(ours) == len(theirs) else f"{where}: {len(ours)} entries and not {len(theirs)}")
    same = torch.equal(ours, theirs) if isinstance(ours, Tensor) and isinstance(theirs, Tensor) else ours == theirs
    return "" if same else f"{where}: {ours} and not {theirs}"
