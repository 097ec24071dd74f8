"""What runs, and what is trained, differs from step to step or from rank to rank."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gemini.core import Home
from tests.cases.base import WIDTH, case, sequences
from tests.cases.basic import Mlp


class _Counting(nn.Module):
    """Counts its calls, so that what it does can depend on the step."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(depth)
        )
        self.calls = 0


@case()
class DynamicDepth(_Counting):
    """As many layers as the step says."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        for block in self.blocks[: (3, 1, 4, 0)[self.calls % 4]]:
            x = x + block(x)
        return self.last(x)


@case()
class StochasticDepth(_Counting):
    """Each step skips other layers."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            if (self.calls * 7 + index * 3) % 4:
                x = x + block(x)
        return self.last(x)


@case()
class DynamicOrder(_Counting):
    """Each step has the layers in another order."""

    def __init__(self) -> None:
        super().__init__(4)
        self.orders = list(itertools.permutations(range(4)))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        for index in self.orders[self.calls * 5 % 24]:
            x = self.blocks[index](x).tanh()
        return self.last(x)


@case()
class DynamicRepeats(_Counting):
    """A layer is called as often as the step says."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        for _ in range(1 + self.calls % 3):
            x = self.blocks[1](self.blocks[0](x))
        return self.last(x)


# What depends on the data, and so on the rank


class _Either(nn.Module):
    """One way or the other, or both, as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Mlp(), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, way: int) -> Tensor:
        if way % 3 != 0:
            x = x + self.left(x)
        if way % 3 != 1:
            x = x + self.right(x) * self.gain
        return x


class SomeRanks(nn.Module):
    """Modules used on some steps and on some ranks only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.either, self.last = nn.Linear(WIDTH, WIDTH), _Either(), nn.Linear(WIDTH, 8)
        self.never = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.either(self.first(x), int(x.abs().sum() * 10)))


@case(options={"unit_modules": [_Either]})
def some_ranks_as_unit() -> nn.Module:
    return SomeRanks()


@case(several=(Home.FULL,))
def some_ranks_kept() -> nn.Module:
    """On ranks that differ, chunks that are freed are refused by name; those that are kept are fine."""
    return SomeRanks()


@case(several=(Home.FULL,))
class SomeHeads(nn.Module):
    """Where one rank has no gradient for a part whose first layers all ranks use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.heads[int(x.detach().abs().sum() * 100) % 3](x)


class Mixture(nn.Module):
    """Each row goes to the expert that the gate prefers; an expert that nobody asks is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == index)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return x + out


class MixtureModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@case(several=(Home.FULL,))
def mixture_kept() -> nn.Module:
    return MixtureModel()


# requires_grad changes


@case()
class FreezesLater(_Counting):
    """From the third step on, a part is trained no more."""

    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.blocks[1].requires_grad_(self.calls < 3)
        self.first.bias.requires_grad_(self.calls < 3)
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


@case()
class TakesTurns(_Counting):
    """Trained by turns, all of it trainable when it is laid out."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for index, block in enumerate(self.blocks):
            block.requires_grad_(self.calls % 2 == index)
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def _toggled(model: nn.Module, batch: Tensor) -> Tensor:
    """As a GAN does: one part is frozen while the loss of the other runs, and not any more in the backward."""
    model.layers[1].requires_grad_(False)
    first = model(batch).square().mean()
    model.layers[1].requires_grad_(True)
    return first + F.l1_loss(model(batch), batch)


@case(loss=_toggled)
class ToggledInLoss(Mlp):
    """``requires_grad`` changes between two forwards of one step."""


@case()
class NoGradParts(nn.Module):
    """A part runs without gradients, in front of and beside the part that is trained; a part detaches."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.body, self.last = Mlp(), Mlp(), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            code = self.encoder(x)
            target = self.body(code)
        return self.last(self.body(code) - target + self.encoder(x).detach())


@case(sequences)
class EvaluatesInside(nn.Module):
    """A part is in eval mode; another part is run in inference mode for a statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.last = Mlp(), nn.BatchNorm1d(6), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        with torch.inference_mode():
            scale = float(self.body(x).std())
        return self.last(self.norm(self.body(x)) * scale)


# Trainable later


class _Unfreezing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last, self.calls = Mlp(), nn.Linear(WIDTH, 8), 0
        self.body.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


@case()
class UnfreezesInForward(_Unfreezing):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.body.layers[4 - self.calls :]:
            layer.requires_grad_(True)
        return super().forward(x)


def _unfreeze(model: nn.Module, batch: Tensor) -> Tensor:
    model.calls += 1
    model.body.requires_grad_(model.calls % 2 == 0)
    return F.mse_loss(model(batch), batch[:, :8])


@case(loss=_unfreeze)
class UnfreezesInLoss(_Unfreezing):
    """Trained, frozen and trained again."""


@case(options={"unit_modules": ["Mixture"]})
def mixture_as_unit() -> nn.Module:
    """A rank without work for an expert comes late to the reduction of its chunk."""
    return MixtureModel()
