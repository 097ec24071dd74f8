"""The contenders: one workload, made ready to train in different ways, all with the same optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from benchmarks.workload import Workload
from lightning_gemini.core import DtypePolicy, Engine, Home, shard

Way = Literal["plain", "ddp", "fsdp2", "gemini"]

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Entry:
    """How one contender trains.

    Attributes:
        name: what the tables call it.
        way: who shards.
        bf16: autocast for ``plain``, a mixed-precision policy with fp32 reductions for the others.
        home: where ``gemini`` keeps its shards.
        chunk_size: elements in a chunk of ``gemini``.
    """

    name: str
    way: Way
    bf16: bool = False
    home: Home = Home.FULL
    chunk_size: int | Literal["auto"] = "auto"


@dataclass
class Contender:
    """A model and an optimizer, ready to train in one :class:`Entry`'s way."""

    entry: Entry
    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[], Tensor]
    engine: Engine | None = None

    def train(self) -> float:
        """One step as a user writes it; returns the loss before it."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def differentiate(self) -> float:
        """Forward and backward; the gradients are thrown away, as for a step that is skipped."""
        loss = self.backward()
        self.optimizer.zero_grad()
        return loss

    def backward(self) -> float:
        """Forward and backward; the gradients stay."""
        loss = self.loss()
        loss.backward()
        return loss.item()


def prepare(entry: Entry, workload: Workload) -> Contender:
    """Builds the workload's model and makes it ready; all ranks have to call, in the same order."""
    model = workload.build()
    engine = None
    if entry.way == "ddp":
        model = DistributedDataParallel(model)
    elif entry.way == "fsdp2":
        _shard_fully(model, workload.blocks(model), entry.bf16)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    if entry.way == "gemini":
        engine = _shard_in_chunks(model, optimizer, entry)
    autocast = entry.way == "plain" and entry.bf16
    loss = partial(_loss, model, workload, workload.batch(), autocast)
    return Contender(entry, model, optimizer, loss, engine)


def _loss(model: nn.Module, workload: Workload, batch: Tensor, autocast: bool) -> Tensor:
    context: AbstractContextManager[object] = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        return workload.loss(model, batch)


def _shard_fully(model: nn.Module, blocks: list[nn.Module], bf16: bool) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _shard_in_chunks(model: nn.Module, optimizer: Optimizer, entry: Entry) -> Engine:
    several = dist.get_world_size() > 1
    return shard(
        model,
        [optimizer],
        group=dist.group.WORLD if several else None,
        reduce_group=dist.new_group() if several else None,
        home=entry.home,
        chunk_size=entry.chunk_size,
        policy=DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32) if entry.bf16 else DtypePolicy(),
    )
