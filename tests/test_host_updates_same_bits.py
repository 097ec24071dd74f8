"""Updates in the background give the bits of updates at once, whatever happens between two steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.core import DtypePolicy, Home, UpdatePolicy, shard
from lightning_gemini.core.speeds import Speeds
from lightning_gemini.optim import Lion
from lightning_gemini.optim.loss_scale import LossScale
from tests.background import ONE_LAYER, Mlp, adamw, as_late_as_possible, loss_of, train, weights
from tests.outcomes import check, group, rank, ranks
from tests.test_mixed import HALF, SPLIT, assert_same_bits

STEPS, FEWER_STEPS = 200, 40
OVERFLOWS = (5, 17, 90, 91, 150)

Optimizer = torch.optim.Optimizer


def momentum(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=0.01)


def lion(params: Any) -> Optimizer:
    return Lion(params, lr=0.002)


@dataclass(frozen=True)
class Mode:
    policy: DtypePolicy = SPLIT
    make: Callable[[Any], Optimizer] = adamw
    update: UpdatePolicy = field(default_factory=lambda: UpdatePolicy(nonfinite="skip"))


MODES = {
    "split": Mode(),
    "fp32 masters": Mode(replace(SPLIT, master="fp32")),
    "bf16 states": Mode(replace(SPLIT, state=torch.bfloat16)),
    "momentum": Mode(DtypePolicy(), momentum),
    "lion": Mode(SPLIT, lion),
    "fp16": Mode(HALF, adamw, UpdatePolicy(loss_scale=LossScale(2.0**10, growth_interval=20))),
    "in backward": Mode(SPLIT, adamw, UpdatePolicy("in_backward")),
}


class Run:
    """One training, and what is said of it: everything that anybody reads on the way."""

    def __init__(self, mode: Mode, overlap: bool, options: dict[str, Any]) -> None:
        self.mode, self.said = mode, list[Any]()
        scale = mode.update.loss_scale
        update = replace(mode.update, overlap=overlap, loss_scale=None if scale is None else replace_scale(scale))
        model = Mlp()
        self.optimizer = mode.make(model.parameters())
        options = {"chunk_size": ONE_LAYER, "group": group(), "policy": mode.policy, "update": update, **options}
        reduces = dist.new_group() if ranks() > 1 else None
        self.engine = shard(model, [self.optimizer], reduce_group=reduces, **options)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.99)

    def go(self, steps: int = STEPS) -> list[Any]:
        average = self.engine.average()
        for step in range(steps):
            self._step(step)
            self.schedule.step()  # at once, while the update is under way
            self.optimizer.param_groups[0]["weight_decay"] = 0.1 / (1 + step % 3)
            average.update(0.1)
            self._read(step)
            if step % 40 == 39:
                average.apply()
                self.said.append(self._evaluate(step))
                average.restore()
            if step % 100 == 99:
                self.said.append(average.gather())
        average.release()
        self.said += [self.engine.counters.skipped, weights(self.engine)]
        self.background = self.engine.store.host_updates.count
        self.engine.release()
        assert self.engine.store.device.used == self.engine.store.host.used == 0
        return self.said

    def _step(self, step: int) -> None:
        waits = self.mode.update.when == "at_step"
        for part in range(step % 3 if waits else 0):
            with self.engine.accumulate():
                self._backward(1000 * (part + 1) + step, 1.0)
        self._backward(step, 1e9 if step in OVERFLOWS and waits else 1.0)
        if waits and step % 2:
            self.said.append(self.engine.clip_grad_norm(self.optimizer, 0.5).item().hex())  # NaN is no NaN
        if waits and step % 4 > 1:
            self.engine.clip_grad_value(self.optimizer, 0.01)
        self.optimizer.step()

    def _backward(self, step: int, factor: float) -> None:
        loss = loss_of(self.engine, ranks() * step + rank())
        self.said.append(loss.detach())
        if factor > 1 and self.engine.scale(loss) is loss:
            factor = float("inf")  # without a loss scale nothing smaller overflows
        with self.engine.backward():
            (self.engine.scale(loss) * factor).backward()

    def _evaluate(self, step: int) -> torch.Tensor:
        with torch.no_grad():
            return loss_of(self.engine, step)

    def _read(self, step: int) -> None:
        if step % 10 == 4:
            self.said.append(self._evaluate(step))
        if step % 25 == 7:
            self.said.append(weights(self.engine))
        if step % 50 == 13:
            self.said.append(self.optimizer.state_dict()["state"])


def replace_scale(scale: LossScale) -> LossScale:
    """A fresh one: it adapts."""
    return LossScale(scale.value, growth_interval=scale.growth_interval)


def trained(mode: Mode, overlap: bool, late: bool = False, steps: int = STEPS, **options: Any) -> Run:
    with as_late_as_possible() if late else nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not finite: the step is skipped")
        one = Run(mode, overlap, options)
        one.go(steps)
        return one


def run(mode: Mode, overlap: bool, late: bool = False, steps: int = STEPS, **options: Any) -> tuple[list[Any], int]:
    one = trained(mode, overlap, late, steps, **options)
    return one.said, one.background


def compare(name: str, steps: int = STEPS) -> None:
    mode, skips = MODES[name], MODES[name].update.when == "at_step"
    kept, none = run(mode, True, steps=steps, home=Home.FULL)
    assert none == 0, "nothing lives in host memory"
    overflows = sum(step < steps for step in OVERFLOWS) if skips else 0
    assert kept[-2] >= overflows
    late, some = run(mode, True, late=True, steps=steps, placement="host")
    assert some >= (steps - kept[-2]) * 4
    assert_same_bits(late, kept)
    if ranks() == 1:
        at_once, none = run(mode, False, steps=steps, placement="host")
        assert none == 0
        assert_same_bits(at_once, kept)


@pytest.mark.parametrize("name", MODES)
def test_one_rank(name: str) -> None:
    compare(name, STEPS if name in ("split", "fp16") else FEWER_STEPS)


def _on_two_ranks() -> None:
    for name, steps in (("split", FEWER_STEPS), ("fp16", 20), ("in backward", 20)):
        try:
            compare(name, steps)
        except AssertionError as error:
            raise AssertionError(name) from error


def _planned() -> None:
    """Some homes on the device and others in host memory, as the plan has it."""
    mode = MODES["bf16 states"]
    kept, _ = run(mode, False, placement="auto", steps=40)
    numbers = set()
    for bound in (9200, 12000):
        late, some = run(mode, True, late=True, steps=40, placement="auto", device_memory=bound)
        assert_same_bits(late, kept)
        numbers.add(some)
    assert min(numbers) > 0
    assert ranks() > 1 or len(numbers) == 2, "with more memory fewer chunks live on the host"


#: Elements per second that host memory updates: seconds for each step, and next to nothing.
SLOW, FAST = 1e2, 1e12


def _planned_by(host_update: float) -> dict[str, Any]:
    """Options for a plan that brings every chunk for the beginning of a step."""
    return {"placement": "auto", "device_memory": 12000, "speeds": Speeds(1e12, 1e12, 1e12, host_update, 1e12)}


def _slow_and_fast() -> None:
    """Gathers are put off where updates are predicted to take long; not where they are a part of the backward."""
    for name, host_update, patient in (("split", SLOW, True), ("split", FAST, False), ("in backward", SLOW, False)):
        options = {"steps": 20, **_planned_by(host_update)}
        at_once, _ = run(MODES[name], False, **options)
        late = trained(MODES[name], True, late=True, **options)
        assert late.engine.store.arrivals.patient is patient, (name, host_update)
        assert late.background > 0
        assert_same_bits(late.said, at_once)


def _gathers_in_the_first_moment(host_update: float) -> list[int]:
    """By step, how many chunks have been gathered when the first layer has computed; one at a time may be ahead."""
    model, found = Mlp(), list[int]()
    optimizer = adamw(model.parameters())
    options = {"group": group(), "reduce_group": dist.new_group(), **_planned_by(host_update)}
    engine = shard(model, [optimizer], chunk_size=ONE_LAYER, **options)
    chunk, counters = engine.store.chunks[0], engine.counters
    before = 0

    def note(*_: Any) -> None:
        found.append((counters.gathered_bytes - before) // (chunk.spec.nbytes - chunk.own.nbytes))

    handle = model.layers[0].register_forward_hook(note)
    with mock.patch("lightning_gemini.core.arrivals._GATHERS_AHEAD", 1):
        for step in range(4):
            before = counters.gathered_bytes
            train(engine, optimizer, step)
    handle.remove()
    engine.release()
    return found


def _put_off() -> None:
    assert _gathers_in_the_first_moment(SLOW) == [1, 1, 1, 1]
    assert _gathers_in_the_first_moment(FAST) == [1, 4, 4, 4], "the first step is recorded"


SCENARIOS = [_on_two_ranks, _planned, _slow_and_fast, _put_off]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks(scenario: Callable[[], None]) -> None:
    check(scenario, SCENARIOS, 2)


def test_planned_homes_on_one_rank() -> None:
    _planned()
