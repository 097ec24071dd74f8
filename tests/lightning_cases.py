"""Lightning modules around the models of ``cases``, and a Trainer that says nothing."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from lightning_gemini.checkpoint.consolidate import consolidate
from lightning_gemini.checkpoint.reader import CheckpointReader
from tests import cases

SAMPLES = 22  # not a multiple of what accumulation and ranks would like


class Module(L.LightningModule):
    """A model of ``cases``, trained as a user would."""

    def __init__(self, name: str = "Mlp", lr: float = 0.01) -> None:
        super().__init__()
        self.name, self.lr = name, lr
        torch.manual_seed(0)
        self.model = cases.CASES[name].build()
        self.losses: list[float] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        return cases.CASES[self.name].loss(self.model, batch[0])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.model(batch[0])

    def configure_optimizers(self) -> Any:
        groups = cases.CASES[self.name].groups
        optimizer = torch.optim.AdamW(groups(self.model) if groups else self.parameters(), lr=self.lr, foreach=False)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def dataset(name: str = "Mlp") -> Dataset:
    generator = torch.Generator().manual_seed(1)
    rows = [cases.CASES[name].batch(generator) for _ in range(SAMPLES)]
    return TensorDataset(torch.stack([row[0] for row in rows]))


def loader(name: str = "Mlp", batch_size: int = 4) -> DataLoader:
    """Splits each global batch over the ranks, in order."""
    data = dataset(name)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    sampler = DistributedSampler(data, shuffle=False) if ranks > 1 else None
    return DataLoader(data, batch_size=batch_size // ranks, sampler=sampler, shuffle=False)


def trainer(strategy: Any = "gemini", devices: int | None = None, **settings: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "accelerator": "cpu",
        "max_epochs": 2,
    }
    if devices is None:
        devices = dist.get_world_size() if dist.is_initialized() and strategy != "auto" else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return L.Trainer(strategy=strategy, devices=devices, **{**quiet, **settings})


def as_file(path: Any) -> Path:
    """A checkpoint of any kind as one file, which plain Lightning and torch read; each rank gets its own."""
    if not os.path.isdir(path):
        return Path(path)
    out = Path(f"{path}-whole-{dist.get_rank() if dist.is_initialized() else 0}")
    consolidate(CheckpointReader(path), out)
    return out


def on_ranks() -> None:
    """Has Lightning take this process for the rank that it is; called in a process made by ``run_ranks``."""
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), NODE_RANK="0", WORLD_SIZE=str(dist.get_world_size()))
