"""What modules take, give and hold: outputs of every kind, inputs that change, references to other modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.base import WIDTH, case, sequences
from tests.cases.basic import Mlp

# Outputs


class _ManyOutputs(nn.Module):
    """A tuple with None, a nested dict, a ``ModelOutput``: by turns."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        a, b = self.a(x).tanh(), self.b(x).tanh()
        if self.kind == 0:
            return a, None, (b, [None, {"x": x}])
        if self.kind == 1:
            return {"out": {"a": a, "none": None, "more": [b, (x,)]}}
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=a, hidden_states=(b, x))


@case()
class ManyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_ManyOutputs(i % 3) for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            out = block(x, mask=None)
            if isinstance(out, tuple):
                x = out[0] + out[2][0]
            elif "out" in out:
                x = out["out"]["a"] * out["out"]["more"][0]
            else:
                x = out.last_hidden_state + out.hidden_states[0]
        return x


class _Opaque:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class _OpaqueBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: _Opaque) -> Any:
        yield _Opaque((self.a(x.value) @ self.weight).tanh())


@case()
class OpaqueOutput(nn.Module):
    """Outputs that no hook understands, from a generator that runs after the forward has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_OpaqueBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        state = _Opaque(x)
        for block in self.blocks:
            for made in block(state):
                state = made
        return state.value


def _main_only(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)["main"].square().mean()


@case(loss=_main_only)
class IgnoredOutputs(nn.Module):
    """The loss has no use for two of three heads; one of them is not even differentiable."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.aside = Mlp(), nn.Linear(WIDTH, 4), Mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"aside": self.aside(x), "main": self.main(x), "best": self.aside(x).argmax(-1)}


class _Cached(nn.Module):
    """Attention over what earlier calls have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if cache:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)), [k, v]


def _call_by_call(model: nn.Module, batch: Tensor) -> Tensor:
    total, caches = torch.zeros(()), None
    for part in batch.split(2, dim=1):
        out, caches = model(part, caches)
        total = total + out.square().mean()
    return total


@case(sequences, _call_by_call)
class CacheBetweenCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Cached() for _ in range(2))

    def forward(self, x: Tensor, caches: list[list[Tensor]] | None = None) -> tuple[Tensor, list[list[Tensor]]]:
        made = []
        for layer, cache in zip(self.layers, caches or [None, None], strict=True):
            x, new = layer(x, cache)
            made.append(new)
        return x, made


# Inputs


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bias = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x += self.bias
        x[:, ::2] = 0.5
        F.relu_(x)
        return self.layer(x).mul_(self.bias)


@case()
def in_place_inputs() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(_InPlace() for _ in range(3)), nn.ReLU(inplace=True))


# References


class _Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(WIDTH, WIDTH)
        self.parents = [parent]
        object.__setattr__(self, "parent", parent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x).tanh() * self.parents[0].scale
        return self.parent.sibling(x) + F.linear(x, self.parent.sibling.weight)


@case()
class Nested(nn.Module):
    """Children that hold their parent, use its parameters and call their siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.sibling = nn.Linear(WIDTH, WIDTH)
        self.child, self.other = _Child(self), _Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.child(x))


class _Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.me = [self]

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = (x @ self.weight).tanh()
        if depth:
            x = x + self.me[0](self.inner(x), depth - 1)
        return x @ self.weight


@case()
def recursive() -> nn.Module:
    """A module that calls itself."""
    return nn.Sequential(_Recursive(), nn.Linear(WIDTH, WIDTH), _Recursive())


@case()
class SharedModules(nn.Module):
    """One module under several names and in several parents."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Sequential(self.a, nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), self.first, self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.a(x)).tanh())


class _Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 6)

    @property
    def upper(self) -> Tensor:
        return self.weight[:WIDTH]


@case()
class ViewsOfWeights(nn.Module):
    """Properties that are views of a weight, kept over other modules' forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.body = _Halves(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = self.store.upper, self.store.weight[WIDTH:].t()
        x = self.body(x)
        return (self.body(x @ upper) @ lower) * upper.norm()
