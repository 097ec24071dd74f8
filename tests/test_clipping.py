"""Clipping and norms, in every precision: what torch does to the gradients of the unsharded model."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gemini.core import DtypePolicy, Engine, Home, UpdatePolicy, shard
from lightning_gemini.optim.loss_scale import LossScale
from tests import cases
from tests.outcomes import check, group, rank, ranks

#: the policy and the loss scale
MODES = {
    "fp32": (DtypePolicy(), None),
    "bf16": (DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32), None),
    "fp16": (DtypePolicy(torch.float16, master="fp32", reduce=torch.float32), 2.0**12),
}
#: what is done one after the other, with a backward before all of it
SEQUENCES = [
    "norm",
    "value",
    "norm norm",
    "norm value",
    "value norm",
    "value norm value",
    "norm backward",
    "value backward",
    "norm value backward norm",
    "backward norm",
    "backward value norm",
]
#: a float away, after a few operations; norms are summed in another order
CLOSE = {"rtol": 4e-6, "atol": 1e-12}


def build(mode: str, make: Any = None) -> tuple[nn.Module, list[torch.optim.Optimizer], Engine]:
    policy, scale = MODES[mode]
    model = cases.build("Mlp")
    make = make or (lambda m: [torch.optim.SGD(m.parameters(), lr=1.0)])
    optimizers = make(model)
    update = UpdatePolicy(loss_scale=None if scale is None else LossScale(scale))
    engine = shard(
        model, optimizers, group=group(), home=Home.DEVICE, chunk_size=2048 * ranks(), policy=policy, update=update
    )
    return model, optimizers, engine


def backward(engine: Engine, step: int) -> None:
    batch = cases.batches("Mlp", 2, ranks())[step][rank()]
    batch = batch.to(engine.layout.params[0].dtype)
    engine.scale(cases.CASES["Mlp"].loss(engine.model, batch)).backward()


def by_hand(mode: str, step: int) -> list[Tensor]:
    """The mean gradients of a batch, in fp32 without the loss scale; the first are kept in the compute dtype."""
    policy, scale = MODES[mode]
    dtype, scale = policy.compute or torch.float32, scale or 1.0
    model = cases.build("Mlp").to(dtype)
    sums = [torch.zeros(p.shape) for p in model.parameters()]
    for batch in cases.batches("Mlp", 2, ranks())[step]:
        model.zero_grad()
        (cases.CASES["Mlp"].loss(model, batch.to(dtype)).float() * scale).backward()
        for total, param in zip(sums, model.parameters(), strict=True):
            total += param.grad
    return [(total / ranks()).to(dtype if step == 0 else torch.float32).float() / scale for total in sums]


def assert_norms(engine: Engine, expected: list[nn.Parameter]) -> None:
    grads = [p.grad for p in expected]
    for kind in (2.0, 1.0, float("inf")):
        theirs = torch.nn.utils.get_total_norm(grads, kind)
        torch.testing.assert_close(engine.grad_norm(norm_type=kind), theirs, **CLOSE)
    by_name = list(engine.grad_norms().values())
    torch.testing.assert_close(by_name, [grad.norm() for grad in grads], **CLOSE)


def assert_grads(engine: Engine, expected: list[nn.Parameter]) -> None:
    with engine.summon(with_grads=True):
        for (name, param), theirs in zip(engine.model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(param.grad, theirs.grad, **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


def values_of(engine: Engine) -> list[Tensor]:
    with engine.summon():
        return [p.detach().clone() for p in engine.model.parameters()]


def clipped(mode: str, sequence: str) -> None:
    model, (optimizer,), engine = build(mode)
    expected = [nn.Parameter(value) for value in values_of(engine)]
    for param, grad in zip(expected, by_hand(mode, 0), strict=True):
        param.grad = grad
    backward(engine, 0)
    assert_norms(engine, expected)
    for word in sequence.split():
        if word == "norm":
            norm = torch.nn.utils.get_total_norm([p.grad for p in expected])
            ours = engine.clip_grad_norm(optimizer, norm.item() * 0.6)
            theirs = torch.nn.utils.clip_grad_norm_(expected, norm.item() * 0.6)
            torch.testing.assert_close(ours, theirs, **CLOSE)
        elif word == "value":
            limit = 0.4 * max(p.grad.abs().max().item() for p in expected)
            engine.clip_grad_value(optimizer, limit)
            torch.nn.utils.clip_grad_value_(expected, limit)
        else:
            backward(engine, 1)
            for param, grad in zip(expected, by_hand(mode, 1), strict=True):
                param.grad += grad
        assert_norms(engine, expected)
    assert_grads(engine, expected)
    assert engine.optimizers is not None
    optimizer.step()
    torch.optim.SGD(expected, lr=1.0).step()
    for ours, theirs in zip(values_of(engine), expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-6)
    assert model.training


SCENARIOS = {(mode, sequence): partial(clipped, mode, sequence) for mode in MODES for sequence in SEQUENCES}


@pytest.mark.parametrize(("mode", "sequence"), list(SCENARIOS))
def test_clipping_is_torchs(mode: str, sequence: str) -> None:
    check(SCENARIOS[mode, sequence], [], 1)


#: one of each kind; the rest is the same on several ranks
SEVERAL = [("fp32", "norm value"), ("bf16", "norm value backward norm"), ("fp16", "norm value backward norm")]


@pytest.mark.parametrize("key", SEVERAL)
def test_clipping_is_torchs_on_two_ranks(key: tuple[str, str]) -> None:
    check(SCENARIOS[key], ON_RANKS, 2)


def two_optimizers_have_their_own(mode: str) -> None:
    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        params = list(model.parameters())
        return [torch.optim.SGD(params[:5], lr=1.0), torch.optim.AdamW(params[5:], lr=0.01)]

    _, (first, second), engine = build(mode, make)
    expected = [nn.Parameter(value) for value in values_of(engine)]
    for param, grad in zip(expected, by_hand(mode, 0), strict=True):
        param.grad = grad
    backward(engine, 0)
    for optimizer, params in ((first, expected[:5]), (second, expected[5:])):
        theirs = torch.nn.utils.get_total_norm([p.grad for p in params])
        torch.testing.assert_close(engine.grad_norm(optimizer), theirs, **CLOSE)
    limit = 0.3 * engine.grad_norm(first).item()
    engine.clip_grad_norm(first, limit)
    torch.nn.utils.clip_grad_norm_(expected[:5], limit)
    engine.clip_grad_value(second, 1e-4)
    torch.nn.utils.clip_grad_value_(expected[5:], 1e-4)
    assert_norms(engine, expected)
    assert_grads(engine, expected)
    first.step()
    assert engine.grad_norm(first) == 0
    theirs = torch.nn.utils.get_total_norm([p.grad for p in expected[5:]])
    torch.testing.assert_close(engine.grad_norm(), theirs, **CLOSE)
    second.step()
    torch.optim.SGD(expected[:5], lr=1.0).step()
    torch.optim.AdamW(expected[5:], lr=0.01).step()
    for ours, wanted in zip(values_of(engine), expected, strict=True):
        torch.testing.assert_close(ours, wanted.detach(), rtol=1e-5, atol=2e-6)


OWN = {mode: partial(two_optimizers_have_their_own, mode) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_two_optimizers_have_their_own_clipping(mode: str, world_size: int) -> None:
    check(OWN[mode], ON_RANKS, world_size)


def small_gradients_survive_both() -> None:
    """Unscaled they are too small for fp16, and it is in fp32 that they are clipped."""
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update = UpdatePolicy(loss_scale=LossScale(2.0**16))
    engine = shard(model, [optimizer], group=group(), policy=MODES["fp16"][0], update=update)
    engine.scale(model(torch.full((1, 8), 1e-4).half()).float().sum() * 1e-4).backward()
    engine.clip_grad_value(optimizer, 5e-9)
    engine.clip_grad_norm(optimizer, 1.0)
    torch.testing.assert_close(engine.grad_norm().item(), 5e-9 * 8, rtol=1e-5, atol=0)


def test_small_gradients_survive_both_kinds_of_clipping() -> None:
    small_gradients_survive_both()


ON_RANKS = [*(SCENARIOS[key] for key in SEVERAL), *OWN.values()]
