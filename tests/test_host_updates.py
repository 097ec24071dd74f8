"""Updates in the background: in what order, who waits for which, and what settings they go by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gemini.core import Engine, Home, UpdatePolicy, shard
from lightning_gemini.core.worker import hidden_share
from tests.background import (
    BUILT,
    Gates,
    adamw,
    as_late_as_possible,
    at_once,
    batch,
    before_updates,
    built,
    loss_of,
    threads,
    train,
    weights,
)
from tests.test_mixed import assert_same_bits

pytestmark = pytest.mark.usefixtures("engines")


# Order, and who waits for what


@pytest.mark.parametrize("options", [{"home": Home.HOST}, {"placement": "host"}, {"placement": "host", "prefetch": 0}])
def test_the_next_forward_waits_for_what_it_touches(gates: Gates, options: dict[str, Any]) -> None:
    engine, optimizer = built(**options)
    seen = []
    engine.model.layers[0].register_forward_hook(lambda *_: seen.append(3 in gates.closed))
    engine.model.layers[2].register_forward_hook(lambda *_: gates.open(3))
    for step in range(4):
        train(engine, optimizer, step, lambda: gates.close(3))
    assert seen == [False, True, True, True], "the last layer's update was held back while the others computed"
    gates.open()
    assert_same_bits(weights(engine), at_once(4, **options))


def test_updates_run_in_the_order_of_need(gates: Gates) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self.layers):
                x = torch.tanh(layer(x))
            return x

    model = Backwards()
    optimizer = adamw(model.parameters())
    engine = shard(model, [optimizer], placement="host", chunk_size=384)
    BUILT.append(engine)
    for step in range(3):
        train(engine, optimizer, step)
    engine.release()
    assert gates.begun == [3, 2, 1, 0] * 3


def test_step_returns_while_its_update_is_held_back(gates: Gates) -> None:
    engine, optimizer = built()
    gates.close(*range(4))
    train(engine, optimizer, 0)
    assert all(chunk.deferred is not None for chunk in engine.store.chunks)
    assert gates.begun in ([], [0]), "the worker stands before the first gate"
    gates.open()
    assert_same_bits(weights(engine), at_once(1))
    assert all(chunk.deferred is None for chunk in engine.store.chunks)


def test_one_summoned_module_waits_for_its_own_chunk(gates: Gates) -> None:
    engine, optimizer = built()
    gates.close(3)
    train(engine, optimizer, 0)
    with engine.summon(engine.model.layers[1]):
        found = engine.model.layers[1].weight.detach().clone()
    assert 3 in gates.closed
    gates.open()
    assert torch.equal(found, at_once(1)[2])


# Settings of the moment of the call


@pytest.mark.parametrize(
    "make",
    [
        adamw,
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01)),
    ],
    ids=["adamw", "sgd", "lr is a tensor"],
)
def test_settings_are_those_of_the_call(gates: Gates, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    def change(optimizer: torch.optim.Optimizer) -> None:
        group = optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(0.7)
        else:
            group["lr"] = 0.7
        group.update(weight_decay=0.9, betas=(0.1, 0.2), eps=0.5, momentum=0.3)

    engine, optimizer = built(make)
    plain, settings = built(make, home=Home.FULL)
    train(engine, optimizer, 0)
    train(engine, optimizer, 1, lambda: gates.close(*range(4)))
    change(optimizer)
    gates.open()
    found = weights(engine)
    for step in range(2):
        train(plain, settings, step)
    assert_same_bits(found, weights(plain))
    change(settings)
    for one, its in ((engine, optimizer), (plain, settings)):
        train(one, its, 2)
    assert_same_bits(weights(engine), weights(plain))


# Anything at all right after a step


def _state(engine: Engine, optimizer: torch.optim.Optimizer) -> Any:
    return engine.optimizer_state_dict(optimizer)


def _load(engine: Engine, optimizer: torch.optim.Optimizer) -> Any:
    state = _state(engine, optimizer)
    train(engine, optimizer, 7)
    engine.load_optimizer_state_dict(optimizer, state)
    train(engine, optimizer, 8)
    return weights(engine), _state(engine, optimizer)


def _write(engine: Engine, optimizer: torch.optim.Optimizer) -> Any:
    with engine.summon(engine.model.layers[3], writeback=True), torch.no_grad():
        engine.model.layers[3].weight.mul_(0.5)
    train(engine, optimizer, 7)
    return weights(engine)


def _average(engine: Engine, optimizer: torch.optim.Optimizer) -> Any:
    average = engine.average()
    train(engine, optimizer, 7)
    average.update(0.3)
    train(engine, optimizer, 8)
    average.update(0.3)
    gathered = average.gather()
    average.load({name: value + 1 for name, value in gathered.items()})
    average.apply()
    with torch.no_grad():
        seen = loss_of(engine, 1)
    average.restore()
    average.update(0.5)
    average.release()
    return gathered, seen, weights(engine)


def _rebudget(engine: Engine, optimizer: torch.optim.Optimizer) -> Any:
    engine.rebudget(9000)
    train(engine, optimizer, 7)
    engine.rebudget(None)
    return weights(engine), _state(engine, optimizer)


def _again(engine: Engine, optimizer: torch.optim.Optimizer) -> Any:
    """Manual optimization: a backward outside of any scope, steps with nothing between them, and a closure."""
    losses = []
    for step in range(3):
        loss = engine.model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    def closure() -> Tensor:
        loss = engine.model(batch(9)).square().mean()
        loss.backward()
        return loss

    losses.append(optimizer.step(closure))
    optimizer.step(closure)
    return losses, weights(engine)


def _two_backwards(engine: Engine, optimizer: torch.optim.Optimizer) -> Any:
    """Steps whose gradients were all there before the first of them: no forward comes between."""
    for module in engine.model.layers:
        engine.model(batch(3)).square().mean().backward()
        engine.clip_grad_norm(optimizer, 0.1)
        with engine.accumulate():
            module(batch(4)).sum().backward()
        optimizer.step()
    return weights(engine)


def _release(engine: Engine, optimizer: torch.optim.Optimizer) -> Any:
    assert engine.release()
    return [param.detach().clone() for param in engine.model.parameters()]


THEN = [_state, _load, _write, _average, _rebudget, _again, _two_backwards, _release]


@pytest.mark.parametrize("options", [{"home": Home.HOST}, {"placement": "host"}, {"placement": "auto"}])
@pytest.mark.parametrize("then", THEN)
def test_what_follows_a_step(then: Callable[..., Any], options: dict[str, Any]) -> None:
    if options["home" if "home" in options else "placement"] == "auto":
        options = {**options, "device_memory": 20000}
    expected = at_once(2, then, **options)
    with as_late_as_possible():
        engine, optimizer = built(**options)
        for step in range(2):
            train(engine, optimizer, step)
        assert engine.store.host_updates.count
        assert_same_bits(then(engine, optimizer), expected)
        engine.release()
    assert threads() == []


@pytest.mark.parametrize("home", list(Home))
def test_beside_an_optimizer_without_a_rule(home: Home) -> None:
    """Each optimizer steps twice as often as the other one somewhere."""

    def outcome(overlap: bool) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        ruled, other = adamw(model[::2].parameters()), torch.optim.NAdam(model[1::2].parameters(), lr=0.01)
        engine = shard(model, [ruled, other], home=home, chunk_size=384, update=UpdatePolicy(overlap=overlap))
        for step in range(12):
            loss_of(engine, step).backward()
            ruled.step()
            if step % 2:
                other.step()
            ruled.zero_grad()
            if step % 3 == 0:
                loss_of(engine, step).backward()
                other.step()
        states = [engine.optimizer_state_dict(optimizer)["state"] for optimizer in (ruled, other)]
        result = weights(engine), states
        assert bool(engine.store.host_updates.count) == (overlap and home is Home.HOST)
        engine.release()
        return result

    with as_late_as_possible():
        late = outcome(True)
    assert_same_bits(late, outcome(False))


# Memory, and time


@pytest.mark.parametrize("when", ["at_step", "in_backward"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_memory_is_that_of_updates_at_once(when: Any, micro_batches: int) -> None:
    if when == "in_backward" and micro_batches > 1:
        return

    def used(overlap: bool) -> list[tuple[int, int, int]]:
        engine, optimizer = built(layers=12, placement="host", update=UpdatePolicy(when, overlap=overlap))
        average, found = engine.average(), []
        for step in range(6):
            engine.store.host.peak = engine.store.host.used
            for part in range(micro_batches - 1):
                with engine.accumulate():
                    loss_of(engine, 100 + part).backward()
            train(engine, optimizer, step)
            average.update(0.5)
            weights(engine)  # waits for everything
            host, device = engine.store.host, engine.store.device
            found.append((host.used, host.peak, device.used))
        engine.release()
        return found

    with as_late_as_possible():
        late = used(True)
    expected = used(False)
    # gradients of updates under way, or parts that wait to be added
    more = 2 * 384 * 4 if when == "in_backward" or micro_batches > 1 else 0
    assert all(host <= a <= host + more for (a, _, _), (host, _, _) in zip(late, expected, strict=True))
    assert [device for _, _, device in late] == [device for _, _, device in expected]
    assert all(peak - more <= limit for (_, peak, _), (_, limit, _) in zip(late[2:], expected[2:], strict=True))


def test_the_share_that_is_hidden() -> None:
    seconds = 0.01

    def hidden(busy: float) -> float:
        engine, optimizer = built()
        for step in range(3):
            train(engine, optimizer, step)
            time.sleep(busy)  # of somebody who needs no weights, such as a data loader
            weights(engine)
        updates = engine.store.host_updates
        assert updates.busy_seconds >= 3 * 4 * seconds
        share = hidden_share(updates.busy_seconds, updates.waited_seconds)
        assert share is not None
        assert f"{share:.0%} hidden" in engine.memory_report()
        engine.release()
        return share

    with before_updates(lambda _: time.sleep(seconds)):
        assert hidden(6 * 4 * seconds) > 0.9
        assert hidden(0.0) < 0.3
