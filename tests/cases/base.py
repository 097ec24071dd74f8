"""What a case is, the registry, and how a case is trained by plain PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gemini.core import Home

WIDTH, ROWS, VOCAB, LENGTH = 32, 4, 96, 12


@dataclasses.dataclass
class Case:
    """A model and how to train it.

    Attributes:
        build: makes the model; the RNG is seeded before.
        batch: makes one rank's batch from a generator.
        loss: model and batch -> scalar.
        groups: model -> what the optimizer is given; all parameters if ``None``.
        options: for ``shard``.
        backward: what is done with the loss.
        scoped: whether the loss is more than calls of the model, so that ``Engine.forward`` has to be around it.
        several: the homes that are compared on several ranks; on one rank it is all of them.
        refused: what is said on the homes where it is refused.
        attributes: what a forward changes in a module beside its buffers; each rank has its own.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    groups: Callable[[nn.Module], Any] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    backward: Callable[[Tensor], Any] = Tensor.backward
    scoped: bool = False
    several: tuple[Home, ...] = tuple(Home)
    attributes: tuple[str, ...] = ("calls",)
    refused: dict[Home, str] = dataclasses.field(default_factory=dict)


#: What trains to the numbers of plain PyTorch, and what is refused, at least on some homes.
CASES: dict[str, Case] = {}
REFUSED: dict[str, Case] = {}


def floats(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=generator)


def sequences(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, 6, WIDTH, generator=generator)


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)


def images(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, 3, 8, 8, generator=generator)


def square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).float().square().mean()


def seeded(model: nn.Module, batch: Tensor) -> Tensor:
    """For models that draw random numbers: the same ones for the same batch, on whatever rank it is."""
    torch.manual_seed(int(batch.abs().sum() * 1000))
    return square(model, batch)


def case(
    batch: Callable[[torch.Generator], Any] = floats,
    loss: Callable[[nn.Module, Any], Tensor] = square,
    into: dict[str, Case] = CASES,
    **rest: Any,
):
    """Registers a module class, or a function that makes a model, under its name."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        if build.__name__ in CASES or build.__name__ in REFUSED:
            raise ValueError(f"there are two cases {build.__name__}")
        into[build.__name__] = Case(build, batch, loss, **rest)
        return build

    return register


# Running them


def find(name: str) -> Case:
    return CASES.get(name) or REFUSED[name]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return find(name).build().train()


def batches(name: str, steps: int, ranks: int) -> list[list[Any]]:
    """``[step][rank]``, the same wherever it is called."""
    generator = torch.Generator().manual_seed(1)
    return [[find(name).batch(generator) for _ in range(ranks)] for _ in range(steps)]


def adamw(name: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """torch's own loop, which runs as it is in chunks, too, so that bits can be compared."""
    groups = find(name).groups
    settings = {"lr": 0.01, "weight_decay": 0.05, "foreach": False} | settings
    return torch.optim.AdamW(groups(model) if groups else model.parameters(), **settings)


def train_plain(name: str, steps: int, ranks: int) -> tuple[list[float], nn.Module, torch.optim.Optimizer]:
    """What ranks with averaged gradients compute, in one process: rank 0's losses, model, optimizer."""
    model = build(name)
    optimizer = adamw(name, model)
    losses = []
    for step in batches(name, steps, ranks):
        buffers, attributes = [b.clone() for b in model.buffers()], _attributes(name, model)
        after: list[Tensor] = []
        gradients: list[dict[nn.Parameter, Tensor]] = []
        for rank, batch in enumerate(step):
            if rank:  # each rank has buffers and attributes of its own
                for buffer, value in zip(model.buffers(), buffers, strict=True):
                    buffer.data.copy_(value)
                for module, values in attributes.items():
                    vars(module).update(values)
            loss = find(name).loss(model, batch)
            find(name).backward(loss)
            gradients.append({p: p.grad for p in model.parameters() if p.grad is not None})
            model.zero_grad()
            if not rank:
                losses.append(loss.item())
                after = [b.clone() for b in model.buffers()]
        for buffer, value in zip(model.buffers(), after, strict=True):
            buffer.data.copy_(value)
        for param in model.parameters():
            parts = [each[param] for each in gradients if param in each]
            if parts:
                param.grad = sum(parts[1:], parts[0]) / ranks
        optimizer.step()
        optimizer.zero_grad()
    return losses, model, optimizer


def _attributes(name: str, model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    keys = find(name).attributes
    return {m: {key: vars(m)[key] for key in keys if key in vars(m)} for m in model.modules()}
