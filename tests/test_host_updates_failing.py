"""Updates in the background that fail or are interrupted, and the threads that make them."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_gemini.core import Home, StateError, UpdateError, UpdatePolicy
from lightning_gemini.core.worker import Worker
from tests.background import (
    PATIENCE,
    Gates,
    at_once,
    batch,
    before_updates,
    built,
    gated,
    loss_of,
    threads,
    train,
    weights,
)
from tests.test_mixed import assert_same_bits

pytestmark = pytest.mark.usefixtures("engines")


# Failures


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("options", [{"home": Home.HOST}, {"placement": "host"}, {"placement": "host", "prefetch": 0}])
def test_a_failure_raises_at_every_entry_from_then_on(wrong: int, options: dict[str, Any]) -> None:
    engine, optimizer = built(**options)
    for step in range(2):
        train(engine, optimizer, step)

    def fail(chunk: int) -> None:
        if chunk == wrong:
            raise ZeroDivisionError("in the kernel")

    average = engine.average()
    with before_updates(fail):
        train(engine, optimizer, 2)
        average.update(0.5)
        with pytest.raises(UpdateError, match=rf"chunk {wrong}, with layers.{wrong}.*ZeroDivisionError: in the kernel"):
            engine.model(batch(3))
    entries: list[Callable[[], Any]] = [
        lambda: loss_of(engine, 0),
        lambda: engine.model(batch(0)),
        lambda: torch.no_grad()(engine.model)(batch(0)),
        lambda: weights(engine),
        lambda: engine.backward().__enter__(),
        optimizer.step,
        engine.average,
        average.gather,
        lambda: engine.optimizer_state_dict(optimizer),
        lambda: engine.rebudget(None),
    ]
    for entry in entries * 2:
        with pytest.raises(UpdateError, match="failed in the background") as caught:
            entry()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    average.release()
    assert not engine.release(keep_weights=False), "it holds no weights of any step"
    assert threads() == []
    assert engine.store.device.used == engine.store.host.used == 0
    with pytest.raises(StateError, match="released"):
        loss_of(engine, 0)


@pytest.mark.parametrize("wrong", range(4))
def test_release_after_a_failure(wrong: int) -> None:
    engine, optimizer = built(placement="host")
    for step in range(2):
        train(engine, optimizer, step)

    def fail(chunk: int) -> None:
        if chunk == wrong:
            raise KeyboardInterrupt  # whatever it is

    with before_updates(fail):
        train(engine, optimizer, 2)
        with pytest.raises(UpdateError, match="KeyboardInterrupt"):
            engine.store.host_updates.keep(0)
    engine.release()
    assert threads() == []
    assert engine.store.device.used == engine.store.host.used == 0


def test_a_failure_in_what_follows_an_update() -> None:
    """The average of a chunk is moved by the worker, too."""
    engine, optimizer = built()
    average = engine.average()
    with gated() as gates:
        gates.close(0)
        train(engine, optimizer, 0)
        average._averages[2] = average._averages[2][:-1]  # of another length
        average.update(0.5)
        gates.open()
    with pytest.raises(UpdateError, match="the update of chunk 2"):
        loss_of(engine, 1)
    engine.release()
    assert threads() == []


@pytest.mark.parametrize("options", [{"home": Home.HOST}, {"placement": "host"}, {"placement": "host", "prefetch": 0}])
@pytest.mark.parametrize("held", [0, 1, 3])
def test_an_interrupt_while_waiting_leaves_the_update_under_way(
    gates: Gates, held: int, options: dict[str, Any]
) -> None:
    """What was brought ahead of its need is freed then, and a copy that comes later would write to nothing."""
    engine, optimizer = built(**options)
    for step in range(2):
        train(engine, optimizer, step)
    train(engine, optimizer, 2, lambda: gates.close(held))
    interrupt = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        loss_of(engine, 1)
    interrupt.join()
    assert held in gates.closed
    gates.open()
    assert_same_bits(weights(engine), at_once(3, **options))
    train(engine, optimizer, 3)
    assert_same_bits(weights(engine), at_once(4, **options))


# Threads


@pytest.mark.parametrize("home", [Home.FULL, Home.DEVICE])
def test_no_thread_where_nothing_lives_in_host_memory(home: Home) -> None:
    engine, optimizer = built(home=home)
    train(engine, optimizer, 0)
    assert threads() == []
    engine, optimizer = built(home=Home.HOST, update=UpdatePolicy(overlap=False))
    train(engine, optimizer, 0)
    assert threads() == []


def test_release_waits_for_updates_under_way(gates: Gates) -> None:
    engine, optimizer = built()
    gates.close(2)
    train(engine, optimizer, 0)
    later = threading.Timer(0.2, gates.open)
    later.start()
    assert engine.release()
    later.join()
    assert threads() == []
    assert_same_bits(list(engine.model.parameters()), at_once(1))


def test_a_worker_that_nobody_closes_ends_with_its_owner() -> None:
    worker, idents = Worker("gemini-update"), list[threading.Thread]()
    worker.submit(lambda: idents.append(threading.current_thread())).result(PATIENCE)
    del worker
    gc.collect()
    idents[0].join(PATIENCE)
    assert not idents[0].is_alive()


def test_a_worker_that_cannot_be_set_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(22, "Invalid argument")

    engine, optimizer = built()
    object.__setattr__(engine.store.host_updates.threads, "cpus", (10**6,))
    monkeypatch.setattr(os, "sched_setaffinity", refused)
    with pytest.raises(OSError, match="Invalid argument"):
        train(engine, optimizer, 0)
    engine.release()
    assert threads() == []
