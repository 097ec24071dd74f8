"""The dtypes of optimizer states and of reductions, and settings that change on the way."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core import ConfigurationError, DtypePolicy, Engine, Home, shard
from lightning_gemini.optim import Lion
from tests import cases
from tests.outcomes import check, group, rank
from tests.test_mixed import SPLIT, assert_same_bits, values_of

FP32, BF16 = DtypePolicy(), DtypePolicy(state=torch.bfloat16)
MIXED_BF16 = DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32, state=torch.bfloat16)


# bf16 states


def regression(policy: DtypePolicy, make: Callable[[Any], Optimizer], steps: int = 200) -> tuple[float, Engine, Any]:
    """The last tenth's mean loss of a small network that learns another one."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    optimizer = make(model.parameters())
    engine = shard(model, [optimizer], policy=policy)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 16)
        with torch.no_grad():
            y = teacher(x)
        loss = (model(x.to(policy.compute or x.dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4 * losses[-1]
    tail = losses[-steps // 10 :]
    return sum(tail) / len(tail), engine, optimizer


RULED: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Lion": lambda p: Lion(p, lr=0.002),
}


@pytest.mark.parametrize("name", RULED)
def test_it_converges_as_with_fp32_states(name: str) -> None:
    expected, _, _ = regression(FP32, RULED[name])
    for policy in (BF16, MIXED_BF16):
        loss, engine, optimizer = regression(policy, RULED[name])
        assert loss == pytest.approx(expected, rel=0.05)
        for state in engine.optimizer_state_dict(optimizer)["state"].values():
            assert {v.dtype for k, v in state.items() if k != "step"} == {torch.bfloat16}


def test_without_stochastic_rounding_an_average_stalls() -> None:
    """The mechanism: what 1 - beta2 adds is less than half of what bf16 can tell apart."""
    square, steps = torch.zeros((), dtype=torch.bfloat16), 3000
    for _ in range(steps):
        square = (square.float() * 0.999 + 0.001).bfloat16()
    assert square < 0.3 * (1 - 0.999**steps)


#: what a state becomes in so many steps of a gradient of ones
AVERAGES: dict[str, tuple[Callable[[Any], Optimizer], str, int, float]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, 0.0, betas=(0.9, 0.999)), "exp_avg_sq", 3000, 1 - 0.999**3000),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, 0.0), "sum", 1500, 1500.0),
    "Lion": (lambda p: Lion(p, 0.0, betas=(0.9, 0.999)), "exp_avg", 3000, 1 - 0.999**3000),
    "SGD": (lambda p: torch.optim.SGD(p, 0.0, momentum=0.99), "momentum_buffer", 600, (1 - 0.99**600) * 100),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_in_bf16_do_not_stall(name: str) -> None:
    make, key, steps, expected = AVERAGES[name]
    model = nn.Linear(64, 64, bias=False)
    optimizer = make(model.parameters())
    engine = shard(model, [optimizer], policy=BF16)
    for _ in range(steps):
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
    state = engine.optimizer_state_dict(optimizer)["state"][0][key].float()
    assert state.mean().item() == pytest.approx(expected, rel=0.01)


def train(engine: Engine, optimizer: Optimizer, start: int, stop: int) -> None:
    engine.model.calls = start
    for (batch,) in cases.batches("Unused", stop, 1)[start:]:
        dtype = next(engine.model.parameters()).dtype
        cases.CASES["Unused"].loss(engine.model, batch.to(dtype)).backward()
        optimizer.step()


def laid_out(policy: DtypePolicy, home: Home = Home.FULL, values: Any = None) -> tuple[Engine, Optimizer]:
    model = cases.build("Unused")
    if values is not None:
        for param, value in zip(model.parameters(), values, strict=True):
            param.data.copy_(value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return shard(model, [optimizer], home=home, chunk_size=2048, policy=policy, group=group()), optimizer


def test_bf16_states_are_saved_and_go_on() -> None:
    for policy in (BF16, MIXED_BF16):
        engine, optimizer = laid_out(policy)
        train(engine, optimizer, 0, 5)
        values, file = values_of(engine), io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        train(engine, optimizer, 5, 10)
        for home in Home:
            file.seek(0)
            twin, again = laid_out(policy, home, values)
            again.load_state_dict(torch.load(file, weights_only=True))
            train(twin, again, 5, 10)
            assert_same_bits(values_of(twin), values_of(engine))
            assert_same_bits(again.state_dict()["state"], optimizer.state_dict()["state"])


def test_states_of_one_dtype_load_into_the_other() -> None:
    for policy, other, dtype in ((FP32, BF16, torch.bfloat16), (BF16, FP32, torch.float32)):
        engine, optimizer = laid_out(policy)
        train(engine, optimizer, 0, 5)
        saved = optimizer.state_dict()
        twin, again = laid_out(other, values=values_of(engine))
        again.load_state_dict(saved)
        loaded = again.state_dict()["state"]
        for number, state in saved["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                assert loaded[number][key].dtype == dtype
                assert torch.equal(loaded[number][key], state[key].to(dtype))
            assert loaded[number]["step"] == state["step"]
        train(twin, again, 5, 8)
        assert {s["exp_avg"].dtype for s in again.state_dict()["state"].values()} == {dtype}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, foreach=False),
        lambda p: torch.optim.NAdam(p),
        lambda p: type("Mine", (torch.optim.AdamW,), {})(p),
    ],
)
def test_bf16_states_need_a_rule(make: Callable[[Any], Optimizer]) -> None:
    model = cases.build("Mlp")
    with pytest.raises(ConfigurationError, match=r"0 \(\w+\) makes its own states, so they cannot be kept in"):
        shard(model, [make(model.parameters())], policy=BF16)
    assert next(model.parameters()).dtype == torch.float32


# Reductions


def reductions() -> None:
    def grads(policy: DtypePolicy, values: tuple[float, float]) -> tuple[Tensor, int]:
        """The mean of gradients that are ``values`` on the two ranks, kept in fp32, and the bytes that were sent."""
        model = nn.Linear(64, 64, bias=False)
        engine = shard(model, [torch.optim.AdamW(model.parameters())], group=group(), policy=policy)
        with engine.accumulate():
            loss = model(torch.ones(1, 64).to(policy.compute)).float().sum() * values[rank()]
            loss.backward()
        with engine.summon(with_grads=True):
            return model.weight.grad.unique(), engine.counters.reduced_bytes

    half = DtypePolicy(torch.float16, master="fp32", reduce=torch.float16)
    mean, sent = grads(half, (60000.0, 60032.0))
    assert mean.isfinite().all(), "their sum is not in the range of fp16"
    assert abs(mean.item() - 60016) <= 32
    assert half.reduce_dtype(torch.float16) == torch.float16
    narrow = DtypePolicy(torch.bfloat16, master="split", reduce=torch.bfloat16)
    wide_mean, wide_sent = grads(SPLIT, (1.0, 1 + 2**-7))
    narrow_mean, narrow_sent = grads(narrow, (1.0, 1 + 2**-7))
    assert wide_mean.item() == 1 + 2**-8
    assert narrow_mean.item() == 1
    assert wide_sent == 2 * narrow_sent == 2 * sent
    crossed, _ = grads(DtypePolicy(torch.bfloat16, master="split", reduce=torch.float16), (1.0, 1 + 2**-7))
    assert crossed.item() == 1 + 2**-8, "fp16 has the bits for it"


def test_reductions_are_in_the_dtype_that_was_asked_for() -> None:
    check(reductions, [reductions], 2)


@pytest.mark.parametrize("policy", [SPLIT, DtypePolicy(torch.bfloat16), MIXED_BF16])
def test_micro_batches_add_up_in_fp32(policy: DtypePolicy) -> None:
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = shard(model, [optimizer], policy=policy)
    x = torch.ones(1, 8).bfloat16()
    with engine.accumulate():
        for size in (256.0, *[1.0] * 7):
            (model(x).float().sum() * size).backward()
    model(x).sum().backward()
    assert engine.grad_norm(norm_type=math.inf) == 264, "in bf16 it would stay at 256"
    optimizer.step()


# Settings that change on the way

CHANGES: dict[str, tuple[Callable[[Any], Optimizer], dict[str, Any]]] = {
    "AdamW": (
        lambda p: torch.optim.AdamW(p, lr=0.01),
        {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.3, "eps": 1e-3},
    ),
    "SGD": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.1, "dampening": 0.2},
    ),
    "SGD without momentum at first": (lambda p: torch.optim.SGD(p, lr=0.05), {"momentum": 0.9}),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.05), {"lr": 0.01, "weight_decay": 0.1, "lr_decay": 0.1}),
    "Lion": (lambda p: Lion(p, lr=0.001), {"lr": 0.003, "betas": (0.5, 0.9), "weight_decay": 0.5}),
    "maximize": (lambda p: torch.optim.AdamW(p, lr=0.01), {"maximize": True}),
    "tensor lr": (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)), {"lr": torch.tensor(0.05)}),
    "to torch's own loop": (lambda p: torch.optim.AdamW(p, lr=0.01), {"foreach": False}),
    "from torch's own loop": (lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False), {"foreach": None}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_change_take_effect_as_in_torch(name: str) -> None:
    make, changes = CHANGES[name]

    def run(chunks: bool) -> tuple[list[Tensor], list[int]]:
        model = cases.build("Unused")
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], 0.7)
        calls: list[int] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        optimizer.register_step_post_hook(lambda *_: calls.append(2))
        engine = shard(model, [optimizer], home=Home.DEVICE, chunk_size=2048) if chunks else None
        for step, (batch,) in enumerate(cases.batches("Unused", 4 + 3 * len(changes), 1)):
            if step > 3 and step % 3 == 1:
                key = list(changes)[step // 3 - 1]
                optimizer.param_groups[0][key] = changes[key]
            cases.CASES["Unused"].loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return values_of(engine) if engine else [p.detach() for p in model.parameters()], calls

    (ours, calls), (theirs, expected) = run(True), run(False)
    assert calls == expected
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("policy", [SPLIT, MIXED_BF16], ids=["split", "bf16 states"])
def test_what_gets_no_gradient_is_left_alone(policy: DtypePolicy) -> None:
    """No decay, no momentum, no step count; with the bits that no bf16 number has."""
    engine, optimizer = laid_out(policy)
    names = [name for name, _ in engine.model.named_parameters()]
    for step in range(9):
        before = dict(zip(names, values_of(engine), strict=True))
        train(engine, optimizer, step, step + 1)
        for name, value in zip(names, values_of(engine), strict=True):
            still = name.startswith("never") or (name.startswith("sometimes") and step % 3 != 2)
            assert torch.equal(value, before[name]) == still, (name, step)
    states = engine.optimizer_state_dict(optimizer)["state"]
    counts = {name: int(states[number]["step"]) for number, name in enumerate(names) if number in states}
    assert set(counts) == {name for name in names if not name.startswith("never")}
    assert {counts[name] for name in counts} == {3, 9}
    assert {counts[name] for name in counts if name.startswith("sometimes")} == {3}


@pytest.mark.parametrize("built", [torch.float64, torch.float16])
def test_dtypes_that_no_rule_suits_are_updated_by_the_optimizer_itself(built: torch.dtype) -> None:
    """In their own dtype, whatever states of rules are kept in."""
    model = nn.Linear(8, 8, dtype=built)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = nn.Linear(8, 8, dtype=built)
    expected.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    engine = shard(model, [optimizer], policy=BF16)
    for _ in range(2):
        for one, its in ((model, optimizer), (expected, plain)):
            its.zero_grad()
            one(torch.ones(2, 8, dtype=built)).square().sum().backward()
            its.step()
    engine.release()
    torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()))
