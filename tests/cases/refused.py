"""What is refused by name, on some placements or on all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_gemini.core import Home
from tests.cases.base import REFUSED, WIDTH, case, square, tokens
from tests.cases.basic import Mlp

WRITES = dict.fromkeys(Home, r"the parameter was changed from outside.*summon_full_params\(writeback=True\)")
TRANSFORMS = dict.fromkeys((Home.DEVICE, Home.HOST), r"torch\.func.*keep all chunks unsharded")

# Writes in the forward


@case(tokens, lambda model, batch: model(batch).square().mean(), into=REFUSED, refused=WRITES)
def embedding_max_norm() -> nn.Module:
    """The forward scales rows of the weight down (under DDP: on each rank other rows, for good)."""
    return nn.Sequential(nn.Embedding(96, WIDTH, max_norm=1.0), Mlp())


@case(into=REFUSED, refused=WRITES)
class ClampedWeight(nn.Module):
    """Writes into its own weight, as a critic with clipped weights does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.body, self.last = nn.Linear(WIDTH, WIDTH), Mlp(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
            self.last.weight.data.mul_(0.9)
        return self.last(self.body(self.layer(x)))


@case(into=REFUSED, refused=WRITES)
class MomentumTeacher(nn.Module):
    """A frozen copy that follows the student by a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Mlp(), Mlp()
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.lerp_(new, 0.1)
        return self.student(x) - self.teacher(x)


# torch.func over a model whose chunks are freed


def _per_sample(model: nn.Module, batch: Tensor) -> Tensor:
    """Gradients by sample, as a part of the loss."""
    params = dict(model.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,)).square().mean()

    gradients = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, batch)
    return square(model, batch) + sum(g.square().sum() for g in gradients.values())


@case(loss=_per_sample, scoped=True, into=REFUSED, refused=TRANSFORMS)
def per_sample_gradients() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))


def _jacobian(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.vmap(torch.func.jacrev(model))(batch).square().mean()


@case(loss=_jacobian, scoped=True, into=REFUSED, refused=TRANSFORMS)
def jacobian() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))


def _forward_mode(model: nn.Module, batch: Tensor) -> Tensor:
    out, tangent = torch.func.jvp(model, (batch,), (torch.ones_like(batch),))
    return out.square().mean() + tangent.square().mean()


@case(loss=_forward_mode, scoped=True, into=REFUSED, refused=TRANSFORMS)
def forward_mode() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
