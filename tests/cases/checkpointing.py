"""Gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.cases.autograd import CustomBlock
from tests.cases.base import WIDTH, case, seeded
from tests.cases.basic import Mlp


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks, self.last = (
            nn.Linear(WIDTH, WIDTH),
            nn.ModuleList(blocks),
            nn.Linear(WIDTH, 8),
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


@case()
def checkpoint_reentrant() -> nn.Module:
    return _Checkpointed(True, [Mlp() for _ in range(3)])


@case()
def checkpoint_nonreentrant() -> nn.Module:
    return _Checkpointed(False, [Mlp() for _ in range(3)])


@case()
def checkpoint_shared_reentrant() -> nn.Module:
    """One module in three checkpoints: its gradient comes in three parts."""
    shared = Mlp()
    return _Checkpointed(True, [shared, Mlp(), shared, shared])


@case()
def checkpoint_shared_nonreentrant() -> nn.Module:
    shared = Mlp()
    return _Checkpointed(False, [shared, Mlp(), shared, shared])


class _ReadsChild(nn.Module):
    """Owns nothing and reads a child's weight: inside a checkpoint no unit announces that."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.other(x).tanh(), self.child.weight) + self.child.bias


@case()
def checkpoint_borrowed() -> nn.Module:
    return _Checkpointed(False, [_ReadsChild() for _ in range(3)])


@case()
def checkpoint_borrowed_reentrant() -> nn.Module:
    return _Checkpointed(True, [_ReadsChild() for _ in range(3)])


@case()
def checkpoint_frozen() -> nn.Module:
    model = _Checkpointed(False, [Mlp() for _ in range(3)])
    model.blocks.requires_grad_(False)
    return model


@case()
def checkpoint_custom() -> nn.Module:
    return _Checkpointed(False, [nn.Sequential(CustomBlock(), CustomBlock()) for _ in range(3)])


class _Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.a(x).tanh())) * (1 + torch.rand(WIDTH))


@case(loss=seeded)
def checkpoint_dropout() -> nn.Module:
    """The recomputation draws the random numbers of the forward again."""
    return _Checkpointed(False, [_Dropping() for _ in range(3)])


@case(loss=seeded)
def checkpoint_dropout_reentrant() -> nn.Module:
    return _Checkpointed(True, [_Dropping() for _ in range(3)])


class _TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.gain = nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.narrow(x.bfloat16()).mul(self.gain).tanh().float())


@case()
def checkpoint_dtypes() -> nn.Module:
    """bf16 parameters beside fp32 ones."""
    return _Checkpointed(False, [_TwoDtypes() for _ in range(3)])


@case()
def checkpoint_dtypes_reentrant() -> nn.Module:
    return _Checkpointed(True, [_TwoDtypes() for _ in range(3)])


@case()
class CheckpointNested(nn.Module):
    """Checkpoints inside checkpoints, around a function that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.blocks, self.last = nn.ModuleList(Mlp() for _ in range(3)), nn.Linear(WIDTH, 8)

    def inner(self, x: Tensor, block: nn.Module) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(self.inner, x, block, use_reentrant=False).tanh()
        return self.last(x)


@case()
class CheckpointSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.body, 3, x, use_reentrant=False)


@case()
class CheckpointByTurns(nn.Module):
    """Other blocks at each step, among them one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.calls = nn.ModuleList(Mlp() for _ in range(3)), 0
        self.blocks[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for index, block in enumerate(self.blocks):
            x = block(x) if (index + self.calls) % 2 else checkpoint(block, x, use_reentrant=False)
        return x


@case(loss=lambda model, batch: model(batch.clone().requires_grad_()).square().mean())
class CheckpointOffloaded(nn.Module):
    """The user's own hooks for saved tensors, inside and around."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            x = self.first(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return checkpoint(self.second, x, use_reentrant=False)
