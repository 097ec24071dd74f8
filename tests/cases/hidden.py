"""Reads that no hook sees, and parameters that are exchanged for a while."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.cases.base import WIDTH, case, square
from tests.cases.basic import Mlp


@case()
class WeightsInList(nn.Module):
    """A plain list of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.weights = [self.a.weight, self.b.weight, self.c.weight]

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = (x @ weight).tanh()
        return self.b(x)


@case()
class WeightInClosure(nn.Module):
    """A weight that a function and a dict hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Mlp()
        weight = self.a.weight
        self.mix = lambda x: x @ weight
        self.table = {"bias": self.b.bias}

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.mix(x)) + self.table["bias"]


def _with_l2(model: nn.Module, batch: Tensor) -> Tensor:
    return square(model, batch) + 0.01 * sum(p.square().sum() for p in model.parameters())


@case(loss=_with_l2, scoped=True)
def l2_in_loss() -> nn.Module:
    return Mlp()


def _with_l1_first(model: nn.Module, batch: Tensor) -> Tensor:
    penalty = sum(p.abs().mean() for name, p in model.named_parameters() if name.endswith("weight"))
    return square(model, batch) + 0.01 * penalty


@case(loss=_with_l1_first, scoped=True)
def l1_in_loss() -> nn.Module:
    """Before the forward."""
    return Mlp()


@case()
class LoopInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.stack([p.norm() for p in self.parameters()]).mean()


def _perturbed(model: nn.Module, batch: Tensor) -> Tensor:
    """Weights that are made from the parameters."""
    changed = {name: param * 1.1 for name, param in model.named_parameters()}
    return square(model, batch) + functional_call(model, changed, (batch,)).square().mean()


@case(loss=_perturbed, scoped=True)
def functional_perturbed() -> nn.Module:
    return Mlp()


def _meta_learning(model: nn.Module, batch: Tensor) -> Tensor:
    """One step of the inner loop, through which the outer one differentiates."""
    params = dict(model.named_parameters())
    inner = functional_call(model, params, batch[:2]).square().mean()
    gradients = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    adapted = {key: p - 0.1 * g for (key, p), g in zip(params.items(), gradients, strict=True)}
    return functional_call(model, adapted, batch[2:]).square().mean()


@case(loss=_meta_learning, scoped=True)
def meta_learning() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
