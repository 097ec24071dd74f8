"""What hooks alone get wrong (each was wrong in some design that was tried)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.base import ROWS, VOCAB, WIDTH, case, tokens
from tests.cases.basic import Mlp


@case(
    lambda g: torch.randn(ROWS, 6, WIDTH, generator=g),
    lambda model, batch: model(batch, batch, batch)[0].square().mean(),
)
def attention() -> nn.Module:
    """Reads the weight of its child ``out_proj``."""
    return nn.MultiheadAttention(WIDTH, 4, batch_first=True)


@case(tokens, lambda model, batch: F.cross_entropy(model(batch).flatten(0, 1), batch.flatten()))
class BorrowedWeight(nn.Module):
    """The root uses the embedding's weight as its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = Mlp()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.embed.weight  # held while other units run
        return F.linear(self.norm(self.body(self.embed(x))), weight)


@case(tokens, lambda model, batch: F.cross_entropy(model(batch).flatten(0, 1), batch.flatten()))
class TiedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = Mlp()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))


class _TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def decode(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


@case()
class OtherMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coder, self.body = _TwoWays(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.coder.decode(self.body(self.coder(x)))


@case()
class BareRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.body = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.scale) + self.shift * self.scale


@case()
def user_hooks() -> nn.Module:
    """A user's forward hooks that read weights, before and after."""
    model = Mlp()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: (args[0] + m.weight.mean(),))
            module.register_forward_hook(lambda m, args, out: out * (1 + m.bias.mean()))
    return model


@dataclasses.dataclass
class _Output:
    value: Tensor
    extra: Any = None


class _DataclassBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> _Output:
        return _Output(x + self.b(self.a(x).tanh()), {"nested": [None, (x,)]})


@case()
class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_DataclassBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).value
        return x


class _SideBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> None:
        self.kept = (x @ self.weight).tanh()


@case()
class SideChannel(nn.Module):
    """Outputs that no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_SideBlock() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block(x)
            x = x + block.kept
            block.kept = None
        return x


class _Quantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + (self.weight.mul(8).round().div(8) - self.weight).detach()
        return F.linear(x, weight, self.bias)


@case()
def straight_through() -> nn.Module:
    return nn.Sequential(_Quantized(WIDTH, WIDTH), nn.ReLU(), _Quantized(WIDTH, WIDTH), nn.ReLU(), _Quantized(WIDTH, 8))


@case()
class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x).tanh() + self.between(x)
        return x


class _FrozenWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).tanh()


@case()
def bias_beside_frozen() -> nn.Module:
    """Releasing a unit when its gradients are in would free the frozen weight too early."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(_FrozenWeight() for _ in range(4)))


@case()
class FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Mlp(), nn.Linear(WIDTH, 8)
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@case()
class FrozenMiddle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = Mlp(), Mlp(), nn.Linear(WIDTH, 8)
        self.middle.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


@case()
class Unused(nn.Module):
    """Parameters that get a gradient never, or not at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.never, self.sometimes = Mlp(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.body(x)
        return self.sometimes(x) if self.calls % 3 == 0 else x


@case()
class OddShapes(nn.Module):
    """0-d, empty, larger than a chunk, of which a view was registered."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 7))
        self.one = nn.Parameter(torch.ones(1))
        self.large = nn.Linear(WIDTH, 400)
        self.strided = nn.Parameter(torch.randn(WIDTH, 800)[:, ::2] / 20)
        self.transposed = nn.Parameter((torch.randn(8, 400) / 20).t())

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + x @ self.strided * self.scalar
        return y.tanh() @ self.transposed * self.one + self.empty.sum()


@case()
class MixedDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.c = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).double()).bfloat16()).float()


@case()
class ComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix = (
            nn.Linear(WIDTH, WIDTH),
            nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.mix, n=WIDTH)
