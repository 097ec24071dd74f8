"""Planned movement beside everything else: the same bits as plain torch, within the bound at every moment."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_gemini.core import Engine, Home, shard
from tests import cases
from tests.placing import SPLIT, Scenario, in_groups, language_model, lm_step


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return cases.Mlp().train()


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)]


def batch(seed: int) -> torch.Tensor:
    return torch.randn(4, cases.WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return model(batch(seed)).square().mean()


def one_step(model: nn.Module, optimizers: list[Optimizer], seed: int) -> float:
    loss = loss_of(model, seed)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def accumulates(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
    """Sums of two exact gradients: the same in any order."""
    for seed in range(5):
        with engine.accumulate() if engine else nullcontext():
            loss_of(model, seed).backward()
        one_step(model, optimizers, seed + 10)
    return []


def evaluates(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
    """Before the first training step, and between steps."""
    said = []
    for seed in range(5):
        with torch.no_grad():
            said += [loss_of(model, 100 + seed + i).item() for i in range(1 + seed % 2)]
        said.append(one_step(model, optimizers, seed))
    return said


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = cases.Mlp(), cases.Mlp()


def both(model: nn.Module) -> list[Optimizer]:
    return [adamw(model.first)[0], adamw(model.second)[0]]


def alternates(scoped: bool) -> Any:
    def train(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
        said = []
        for seed in range(5):
            for mine, other, optimizer in ((model.first, model.second, 0), (model.second, model.first, 1)):
                other.requires_grad_(False)
                with engine.forward(f"half {optimizer}") if engine and scoped else nullcontext():
                    loss = other(mine(batch(seed))).square().mean()
                loss.backward()
                optimizers[optimizer].step()
                optimizers[optimizer].zero_grad()
                other.requires_grad_(True)
                said.append(loss.item())
        return said

    return train


def summons(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
    said = []
    for seed in range(5):
        with engine.summon(writeback=True) if engine else nullcontext(), torch.no_grad():
            model.layers[0][0].weight.mul_(0.5)
            said.append(model.layers[3][2].bias.sum().item())
        said.append(one_step(model, optimizers, seed))
    return said


def drops_layers(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
    said = []
    for seed in range(16):
        x = batch(seed)
        for index in (0, 1, 3) if seed % 4 == 1 else (0, 1, 2, 3) if seed % 4 != 3 else (3, 0):
            x = model.layers[index](x)
        loss = x.square().mean()
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        said.append(loss.item())
    if engine:  # three kinds of steps, and each is met again
        assert len(engine._schedule.playbook.known) == 3
        assert engine.counters.followed >= 8
    return said


def changes_size(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
    said = []
    for seed in range(8):
        if engine and seed >= 2:
            engine.rebudget(engine.store.device.capacity * 2 if seed % 2 else engine.store.device.capacity // 2 + 8192)
        said.append(one_step(model, optimizers, seed))
    return said


class StoppedError(Exception):
    pass


def fails_on_the_way(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
    """At each place where a chunk is made usable, in every kind of step; what was begun is dropped."""
    said = [one_step(model, optimizers, 0), one_step(model, optimizers, 1)]
    if engine:
        acquire = engine._schedule.acquire
        for nth in range(1, 40):
            left = [nth]

            def stop(*args: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise StoppedError
                acquire(*args)

            engine._schedule.acquire = stop
            try:
                with engine.forward(), engine.backward() if nth % 2 else nullcontext():
                    loss_of(model, 7).backward()
            except StoppedError:
                engine.abort()
                assert engine.store.device.work == 0
                assert not engine._schedule.residents.in_use
            else:
                assert nth > 8
                engine._schedule.acquire = acquire
                optimizers[0].zero_grad()
                break
            finally:
                engine._schedule.acquire = acquire
        else:
            raise AssertionError("it never came to the end")
    return said + [one_step(model, optimizers, seed) for seed in range(2, 6)]


def nadam(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.NAdam(model.parameters(), lr=0.01, foreach=False)]


def rmsprop(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.RMSprop(model.parameters(), lr=0.001, centered=True, momentum=0.9, foreach=False)]


def trains(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
    return [one_step(model, optimizers, seed) for seed in range(5)]


def saves_and_loads(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
    """Optimizer states, before the first plan and after it, with homes that move in between."""
    said = []
    for seed in range(5):
        said.append(one_step(model, optimizers, seed))
        if engine:
            state = engine.optimizer_state_dict(optimizers[0])
            if seed == 2:
                engine.rebudget(engine.store.device.capacity * 3 // 2)
            engine.load_optimizer_state_dict(optimizers[0], state)
    return said


SCENARIOS = {
    "accumulates": Scenario(mlp, adamw, accumulates),
    "evaluates": Scenario(mlp, adamw, evaluates),
    "alternates": Scenario(Pair, both, alternates(False)),
    "alternates in scopes": Scenario(Pair, both, alternates(True)),
    "summons": Scenario(mlp, adamw, summons),
    "drops layers": Scenario(mlp, adamw, drops_layers),
    "changes size": Scenario(mlp, adamw, changes_size),
    "fails on the way": Scenario(mlp, adamw, fails_on_the_way),
    "NAdam": Scenario(mlp, nadam, trains),
    "RMSprop": Scenario(mlp, rmsprop, trains),
    "saves and loads": Scenario(mlp, adamw, saves_and_loads),
}


@pytest.mark.parametrize("placement", ["host", "auto"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_same_as_plain_torch(name: str, placement: str) -> None:
    scenario = SCENARIOS[name]
    need = Scenario(scenario.build, scenario.optimizers, trains_any).sharded(placement="device").need
    scenario.bounded(placement, need).same(scenario.plain())


def trains_any(model: nn.Module, optimizers: list[Optimizer], engine: Engine | None) -> list[Any]:
    for seed in range(2):
        loss = model.second(model.first(batch(seed))) if isinstance(model, Pair) else model(batch(seed))
        loss.square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return []


@pytest.mark.parametrize(("device", "host"), [(60, 50), (75, 35)])
def test_host_memory_that_homes_have_left_is_there_for_others(device: int, host: int) -> None:
    """The shards of all chunks lie in one slab at first; when some have gone to the device, states need their room."""
    model = language_model(layers=4, hidden=64)
    need = 14 * sum(param.numel() for param in model.parameters())
    optimizers = in_groups(model)
    engine = shard(
        model,
        optimizers,
        placement="auto",
        device_memory=need * device // 100,
        host_memory=need * host // 100,
        policy=SPLIT,
    )
    for seed in range(3):
        lm_step(model, optimizers, seed)
        optimizers[0].zero_grad()
    homes = {chunk.home for chunk in engine.store.chunks}
    assert Home.HOST in homes
    assert len(homes) > 1
    engine.release()
