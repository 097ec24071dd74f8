"""Gradients on their way to host memory: late copies, and parts that are added beside the training thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gemini.core import DtypePolicy, UpdatePolicy, shard
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.landing import Addition
from lightning_gemini.core.streams import Lane, Mark
from lightning_gemini.optim.loss_scale import LossScale
from tests.placing import SPLIT, in_groups, language_model, lm_loss

HALF = DtypePolicy(torch.float16, master="fp32", reduce=torch.float32)


class LateMark:
    """Of a copy that is never over before somebody waits for it, as on a device that is behind the host."""

    def __init__(self) -> None:
        self._waited = False

    def join(self) -> None:
        return

    def wait(self) -> None:
        self._waited = True

    def over(self) -> bool:
        return self._waited


@contextmanager
def late_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def mark(_: Lane) -> Mark:
        return LateMark()

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "mark", mark)
        yield


def train(policy: DtypePolicy, placement: str, micro_batches: int, clip: float | None) -> list[Tensor]:
    model = language_model(layers=2, hidden=32)
    optimizers = in_groups(model)
    update = UpdatePolicy(loss_scale=LossScale(initial_scale=2.0**10, growth_interval=2) if policy is HALF else None)
    engine = shard(model, optimizers, placement=placement, policy=policy, update=update, chunk_size=2048)  # type: ignore[arg-type]
    for step in range(3):
        for part in range(micro_batches):
            if part < micro_batches - 1:
                with engine.accumulate():
                    one_backward(engine, model, 10 * step + part)
            else:
                one_backward(engine, model, 10 * step + part)
        if clip is not None:
            engine.clip_grad_norm(None, clip)
        optimizers[0].step()
        optimizers[0].zero_grad()
    engine.release()
    return [param.detach() for param in model.parameters()]


def one_backward(engine: Any, model: Any, seed: int) -> None:
    with engine.forward():
        loss = engine.scale(lm_loss(model, seed))
    with engine.backward():
        loss.backward()


@pytest.mark.parametrize(("policy", "micro_batches", "clip"), list(product((SPLIT, HALF), (1, 3), (None, 0.1))))
def test_copies_that_are_over_late_change_nothing(
    policy: DtypePolicy, micro_batches: int, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = train(policy, "device", micro_batches, clip)
    at_once = train(policy, "host", micro_batches, clip)
    with late_copies(monkeypatch):
        late = train(policy, "host", micro_batches, clip)
    assert all(torch.equal(a, b) for a, b in zip(kept, at_once, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, late, strict=True))


def test_a_gradient_waits_for_what_is_on_its_way() -> None:
    waits = []
    gradient = object.__new__(ChunkGradient)
    gradient._shard, gradient.landing = torch.ones(2), lambda: waits.append(1)
    assert gradient.shard is not None
    assert waits == [1]


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widened", [False, True])
def test_an_addition(widened: bool, dtype: torch.dtype, factor: float) -> None:
    torch.manual_seed(0)
    numel = 2**18 + 77  # more than a block
    before = torch.randn(numel, dtype=torch.bfloat16 if widened else torch.float32)
    part = torch.randn(numel).to(dtype)
    expected = before.float() + part.float() * factor
    target = torch.empty(numel) if widened else before
    addition = Addition(target, before, part, factor, counts=True)
    addition.run()
    assert torch.equal(target, expected)
    assert addition.square_sum is not None
    assert addition.square_sum.item() == pytest.approx(expected.double().square().sum().item(), rel=1e-12)
    assert [tensor is part or tensor is before for tensor in addition.spent] == [True] * (1 + widened)


def test_parts_cross_as_narrow_as_they_come() -> None:
    model = language_model(layers=2, hidden=32)
    optimizers = in_groups(model)
    engine = shard(model, optimizers, placement="host", policy=SPLIT, chunk_size=2048)
    elements = sum(chunk.own.numel() for chunk in engine.store.chunks)
    for part in range(3):
        with engine.accumulate():
            one_backward(engine, model, part)
        assert engine.counters.offloaded_bytes == (part + 1) * 2 * elements
    engine.release()
