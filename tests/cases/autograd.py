"""What uses autograd in other ways than one backward through modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.cases.base import WIDTH, case, square
from tests.cases.basic import Mlp


def _penalised(model: nn.Module, batch: Tensor) -> Tensor:
    x = batch.clone().requires_grad_()
    out = model(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().mean() + gradient.square().mean()


@case(loss=_penalised)
class GradientPenalty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class _Custom(torch.autograd.Function):
    """Keeps the raw weight outside ``save_for_backward``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad @ ctx.weight.t(), x.t() @ grad


class CustomBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return _Custom.apply(x, self.weight).tanh()


@case()
def custom_function() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(CustomBlock() for _ in range(4)))


class _Cube(torch.autograd.Function):
    """Its backward can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x @ weight).pow(3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        inner = grad * 3 * (x @ weight).square()
        return inner @ weight.t(), x.t() @ inner


class _CubeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + _Cube.apply(x, self.weight)


@case(loss=_penalised, scoped=True)
def custom_function_penalty() -> nn.Module:
    return nn.Sequential(*(_CubeBlock() for _ in range(3)), nn.Linear(WIDTH, 4))


@case(loss=_penalised, scoped=True)
def convolution_penalty() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 3), nn.SiLU(), nn.Flatten(),
        nn.LayerNorm(32), nn.Linear(32, 4),
    )  # fmt: skip


def _deep() -> nn.Module:
    """More chunks than the few that stay."""
    layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 48), nn.Tanh()) for _ in range(1))
    return nn.Sequential(*layers, *(nn.Sequential(nn.Linear(48, 48), nn.Tanh()) for _ in range(5)), nn.Linear(48, 4))


@case(loss=_penalised, scoped=True)
def deep_gradient_penalty() -> nn.Module:
    return _deep()


def _penalised_weights(model: nn.Module, batch: Tensor) -> Tensor:
    """A penalty on the gradient of the weights: their gradients do not go through ``AccumulateGrad``."""
    loss = square(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True, allow_unused=True)
    return loss + 0.1 * sum(g.square().sum() for g in gradients if g is not None)


@case(loss=_penalised_weights, scoped=True)
def weight_gradient_penalty() -> nn.Module:
    return _deep()


def _adapted(model: nn.Module, batch: Tensor) -> Tensor:
    """Gradients of the weights that only weigh the loss: nothing of them is differentiated."""
    loss = square(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return loss / (1 + sum(g.norm() for g in gradients))


@case(loss=_adapted, scoped=True)
def weight_gradient_norm() -> nn.Module:
    return Mlp()


def _twice(loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    (loss * 0.5).backward()


@case(backward=_twice)
def retain_graph() -> nn.Module:
    """Two backwards through one graph."""
    return Mlp()


@case(backward=_twice)
def retain_graph_reads() -> nn.Module:
    return nn.Sequential(CustomBlock(), nn.LSTMCell(WIDTH, 16), _Sum(), nn.Linear(16, 8))


class _Sum(nn.Module):
    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return x[0] + x[1]


def _in_two(model: nn.Module, batch: Tensor) -> Tensor:
    """Two losses of one body with a backward each, the first of them here."""
    body = model.layers[:2](batch)
    model.layers[2](body).square().mean().backward(retain_graph=True)
    return model.layers[3](body).square().mean()


@case(loss=_in_two)
def two_losses() -> nn.Module:
    return Mlp()


def _several_backwards(model: nn.Module, batch: Tensor) -> Tensor:
    """Micro-batches by hand."""
    for part in batch.split(1)[1:]:
        (square(model, part) / len(batch)).backward()
    return square(model, batch[:1]) / len(batch)


@case(loss=_several_backwards)
def several_backwards() -> nn.Module:
    return Mlp()


def _cut(model: nn.Module, batch: Tensor) -> Tensor:
    """Truncated: the backward of the head first, then of the body from its gradient."""
    body = model.layers[:2](batch)
    cut = body.detach().requires_grad_()
    loss = model.layers[2:](cut).square().mean()
    loss.backward()
    return (body * cut.grad).sum()


@case(loss=_cut)
def cut_graph() -> nn.Module:
    return Mlp()


# Hooks of the user on gradients


@case()
def backward_hooks() -> nn.Module:
    """Full hooks before and after the backward, which replace gradients."""
    model = Mlp()
    for module in model.layers[1:].modules():  # the first has no gradient of its input
        if isinstance(module, nn.Linear):
            module.register_full_backward_pre_hook(lambda m, grads: (grads[0] * (1 + m.bias.detach().mean()),))
            module.register_full_backward_hook(
                lambda m, inputs, grads: (inputs[0] * 1.5,) if inputs[0] is not None else None
            )
    return model


@case()
def old_backward_hook() -> nn.Module:
    model = Mlp()
    model.layers[1][1].register_backward_hook(lambda m, inputs, grads: None)
    return model


@case()
def hooks_on_gradients() -> nn.Module:
    """On a parameter's gradient: scaled, masked, and scaled again when it has been accumulated."""
    model = Mlp()
    weights = [layer[0].weight for layer in model.layers]
    weights[0].register_hook(lambda grad: grad * 0.5)
    weights[1].register_hook(lambda grad: grad.masked_fill(torch.eye(*grad.shape).bool(), 0))
    weights[2].register_post_accumulate_grad_hook(_halve)
    return model


def _halve(param: Tensor) -> None:
    param.grad.mul_(0.5)


@case()
class HooksOnActivations(nn.Module):
    """A forward hook that replaces the output, and one on the gradient of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()
        self.body.layers[0].register_forward_hook(self.replace)
        self.body.register_forward_hook(lambda m, args, kwargs, out: out + args[0], with_kwargs=True)

    def replace(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        out = out.detach().sign() * out.square()
        out.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@case()
class GradientReversal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.domain, self.head = Mlp(), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) + self.domain(_Reversal.apply(x))


# torch.func


def _functional(model: nn.Module, batch: Tensor) -> Tensor:
    return functional_call(model, dict(model.named_parameters()), batch).square().mean()


@case(loss=_functional, scoped=True)
def functional() -> nn.Module:
    return Mlp()


def _vmapped(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.vmap(model)(batch).square().mean()


@case(loss=_vmapped)
def vmap() -> nn.Module:
    return Mlp()
