"""Parts that a compiler has had in hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.cases.base import WIDTH, case
from tests.cases.basic import Mlp


class CompiledBody(nn.Module):
    def __init__(self, backend: str, in_place: bool) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        if in_place:
            body.compile(backend=backend)
        self.body = body if in_place else torch.compile(body, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.body(self.first(x)).tanh()))


@case()
def compiled_submodule() -> nn.Module:
    return CompiledBody("eager", in_place=False)


@case()
def compiled_submodule_aot() -> nn.Module:
    return CompiledBody("aot_eager", in_place=False)


@case()
def compiled_in_place() -> nn.Module:
    return CompiledBody("aot_eager", in_place=True)


@case()
def compiled_root() -> nn.Module:
    torch._dynamo.reset()
    model = Mlp()
    model.compile(backend="aot_eager")
    return model


@case()
class CompiledMethod(nn.Module):
    """A compiled function that calls modules."""

    def __init__(self) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.run = torch.compile(self.both, backend="eager")

    def both(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()) @ self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class _Scripted(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(WIDTH, WIDTH), body, nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def _body() -> nn.Module:
    torch._C._set_graph_executor_optimize(False)  # it rounds the first calls otherwise than the later ones
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


@case()
def scripted_submodule() -> nn.Module:
    return _Scripted(torch.jit.script(_body()))


@case()
def traced_submodule() -> nn.Module:
    return _Scripted(torch.jit.trace(_body(), torch.zeros(2, WIDTH)))
