"""Loss scaling, and gradients that are not finite: all ranks skip, or all raise, and nothing has changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core import DtypePolicy, Engine, Home, NonFiniteError, UpdatePolicy, shard
from lightning_gemini.optim.loss_scale import LossScale
from tests.outcomes import check, group, rank, ranks
from tests.test_mixed import HALF, SPLIT, assert_same_bits, values_of

Scenario = Callable[[], Any]
#: what each is called, and what is known to be wrong with it
SCENARIOS: dict[str, Scenario] = {}

SCALE = 2.0**10
RULED: Callable[..., Optimizer] = partial(torch.optim.AdamW, lr=0.01)
AS_IT_IS: Callable[..., Optimizer] = partial(torch.optim.AdamW, lr=0.01, foreach=False)
STEPWISE: Callable[..., Optimizer] = partial(torch.optim.SGD, lr=1.0)


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


class Two(nn.Module):
    """Two layers beside each other, so that one can overflow alone; counts its batches and averages what it sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("batches", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor, a: float = 1.0, b: float = 1.0) -> Tensor:
        self.batches += 1
        self.seen.lerp_(x.detach().float().mean(0), 0.5)
        return self.a(x).float().square().mean() * a + self.b(x).float().square().mean() * b


def built(
    make: Any = RULED,
    scale: LossScale | None = None,
    policy: DtypePolicy = HALF,
    home: Home = Home.FULL,
    nonfinite: Any = "raise",
) -> tuple[Engine, Any]:
    """The engine, and its optimizer; two of them, for ``a`` and for ``b``, if there are two in ``make``."""
    model = Two()
    several = isinstance(make, tuple)
    optimizers = [m(part.parameters()) for m, part in zip(make, (model.a, model.b), strict=True)] if several else None
    optimizers = optimizers or [make(model.parameters())]
    update = UpdatePolicy(nonfinite=nonfinite, loss_scale=scale)
    engine = shard(model, optimizers, group=group(), policy=policy, home=home, chunk_size=64 * ranks(), update=update)
    return engine, optimizers if several else optimizers[0]


def batch(step: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank())).to(dtype)


def backward_to_infinity(engine: Engine) -> None:
    """Leaves infinities in the gradients of ``b``, and no NaN: of one sample they are products, not sums."""
    loss = engine.model(batch(0)[:1].clamp(min=0.1), b=HUGE if last() else 1.0)
    engine.scale(loss).backward()
    assert engine.grad_norm(norm_type=1.0) == float("inf")


def last() -> bool:
    """Whether this is the rank where things go wrong."""
    return rank() == ranks() - 1


def backward(engine: Engine, step: int, dtype: torch.dtype = torch.float16, **factors: float) -> None:
    """``factors`` are those of the loss, on the last rank."""
    loss = engine.model(batch(step, dtype), **(factors if last() else {}))
    engine.scale(loss).backward()


def facts(engine: Engine, *optimizers: Optimizer) -> list[Any]:
    return [values_of(engine), [engine.optimizer_state_dict(o)["state"] for o in optimizers]]


HUGE = 1e9


def _skips(make: Any, home: Home) -> None:
    scale = LossScale(SCALE)
    engine, optimizer = built(make, scale, home=home)
    hooks: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    for step in range(2):
        backward(engine, step)
        optimizer.step()
    before = facts(engine, optimizer)
    with engine.accumulate():
        backward(engine, 2)
    backward(engine, 3, b=HUGE)
    assert not engine.grad_norm().isfinite()
    buffers = [buffer.clone() for buffer in engine.model.buffers()]
    optimizer.step()
    assert_same_bits(facts(engine, optimizer), before)
    if ranks() == 1:
        assert_same_bits(list(engine.model.buffers()), buffers)
    else:
        seen = [one.clone() for one in engine.store.collectives.gather_objects(engine.model.seen)]
        assert torch.equal(seen[0], seen[1]), "rank 0's count, in a step that is skipped too"
    assert engine.grad_norm() == 0
    assert all(p.grad is None for p in engine.model.parameters())
    assert scale.value == SCALE / 2
    assert engine.counters.skipped == 1
    assert len(hooks) == 3
    # and goes on as if the step had never been
    backward(engine, 4)
    optimizer.step()
    other, twin = built(make, LossScale(SCALE / 2), home=home)
    for step in (0, 1, 4):
        backward(other, step)
        twin.step()
    for ours, theirs in zip(values_of(engine), values_of(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    if rank() == 0:
        assert all(s["step"] == 3 for s in engine.optimizer_state_dict(optimizer)["state"].values())
    else:
        engine.optimizer_state_dict(optimizer)


@scenario
def an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    _skips(RULED, Home.FULL)
    _skips(AS_IT_IS, Home.HOST)


@scenario
def an_overflow_in_any_micro_batch_skips_the_step() -> None:
    for culprit in range(3):
        scale = LossScale(SCALE)
        engine, optimizer = built(RULED, scale)
        before = values_of(engine)
        for step in range(3):
            factors = {"a": HUGE} if step == culprit else {}
            if step < 2:
                with engine.accumulate():
                    backward(engine, step, **factors)
            else:
                backward(engine, step, **factors)
        optimizer.step()
        assert_same_bits(values_of(engine), before)
        assert scale.value == SCALE / 2


@scenario
def the_scale_grows_after_an_interval_of_good_steps() -> None:
    scale = LossScale(SCALE, growth_factor=4.0, growth_interval=3)
    engine, optimizer = built(RULED, scale)
    values = []
    for step in range(8):
        backward(engine, step, a=HUGE if step == 4 else 1.0)
        optimizer.step()
        values.append(scale.value / SCALE)
    assert values == [1, 1, 4, 4, 2, 2, 2, 8]


@scenario
def one_optimizers_overflow_leaves_the_others_gradients_right() -> None:
    for make in (STEPWISE, RULED, partial(torch.optim.SGD, lr=1.0, foreach=False)):
        scale = LossScale(SCALE)
        engine, (first, second) = built((make, make), scale)
        plain, (_, expected) = built((make, make), LossScale(4.0))
        for step in range(3):
            with engine.accumulate():
                backward(engine, step, a=HUGE if step == 1 else 1.0)
            with plain.accumulate():
                backward(plain, step)
            first.step()
            torch.testing.assert_close(engine.grad_norm(second), plain.grad_norm(expected), rtol=1e-3, atol=0)
        assert scale.value == SCALE / 2, "the third backward came with another scale than the first two"
        for e, o in ((engine, second), (plain, expected)):
            e.clip_grad_norm(o, 0.1)
            o.step()
        # rounding of fp16 gradients at two scales, in steps of 0.01 at most
        for ours, theirs in zip(values_of(engine)[2:], values_of(plain)[2:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@scenario
def at_the_minimum_it_raises_on_all_ranks_and_names_the_parameter() -> None:
    scale = LossScale(2.0, minimum=1.0)
    engine, optimizer = built(RULED, scale)
    backward(engine, 0, b=HUGE * HUGE)
    optimizer.step()
    assert scale.value == 1
    before = facts(engine, optimizer)
    for _ in range(2):
        backward(engine, 1, b=HUGE * HUGE)
        with pytest.raises(NonFiniteError, match=r"gradient of b\.weight is not finite even with a loss scale of 1\.0"):
            optimizer.step()
    assert_same_bits(facts(engine, optimizer), before)
    backward(engine, 2)
    optimizer.step()
    assert not torch.equal(values_of(engine)[0], before[0][0])


@scenario
def two_optimizers_reach_the_minimum_with_one_backward() -> None:
    """GradScaler lowers its scale once for both; in no case has the minimum been tried here."""
    scale = LossScale(2.0, minimum=1.0)
    engine, optimizers = built((RULED, RULED), scale)
    backward(engine, 0, a=HUGE * HUGE, b=HUGE * HUGE)
    for optimizer in optimizers:
        optimizer.step()
    assert scale.value == 1


@scenario
def clipping_does_not_hide_an_overflow() -> None:
    for words in (("norm",), ("value",), ("norm", "value"), ("value", "norm")):
        scale = LossScale(SCALE)
        engine, optimizer = built(RULED, scale)
        before = values_of(engine)
        backward_to_infinity(engine)
        for word in words:
            (engine.clip_grad_norm if word == "norm" else engine.clip_grad_value)(optimizer, 0.1)
        optimizer.step()
        assert scale.value == SCALE / 2, words
        assert_same_bits(values_of(engine), before)


@scenario
def clipping_between_backwards_does_not_hide_an_overflow() -> None:
    scale = LossScale(SCALE)
    engine, optimizer = built(RULED, scale)
    backward_to_infinity(engine)
    engine.clip_grad_value(optimizer, 0.1)
    backward(engine, 1)
    optimizer.step()
    assert scale.value == SCALE / 2


# Without a loss scale


@scenario
def nonfinite_gradients_raise_on_all_ranks_and_name_the_first() -> None:
    for make, home in ((RULED, Home.FULL), (AS_IT_IS, Home.DEVICE)):
        for policy, dtype in ((SPLIT, torch.bfloat16), (DtypePolicy(), torch.float32)):
            engine, optimizer = built(make, None, policy, home)
            backward(engine, 0, dtype)
            optimizer.step()
            before = facts(engine, optimizer)
            # on the last rank, then b on the last rank and a on the first: by the order of the model it is a
            backward(engine, 1, dtype, b=float("inf"))
            with pytest.raises(NonFiniteError, match=r"gradient of b\.weight is not finite \(the first"):
                optimizer.step()
            factors = {"b": float("nan")} if last() else {}
            factors |= {"a": float("nan")} if rank() == 0 else {}
            engine.model(batch(1, dtype), **factors).backward()
            with pytest.raises(NonFiniteError, match=r"gradient of a\.weight is not finite \(the first"):
                optimizer.step()
            assert_same_bits(facts(engine, optimizer), before)
            assert engine.grad_norm() == 0
            # and goes on
            other, twin = built(make, None, policy, home)
            for one, stepping, steps in ((engine, optimizer, (2, 3)), (other, twin, (0, 2, 3))):
                for step in steps:
                    backward(one, step, dtype)
                    stepping.step()
            assert_same_bits(facts(engine, optimizer), facts(other, twin))


@scenario
def nonfinite_gradients_are_skipped_where_that_is_wanted() -> None:
    engine, optimizer = built(RULED, None, SPLIT, nonfinite="skip")
    backward(engine, 0, torch.bfloat16)
    optimizer.step()
    before = facts(engine, optimizer)
    backward(engine, 1, torch.bfloat16, a=float("inf"))
    with pytest.warns(UserWarning, match=r"gradient of a\.weight is not finite: the step is skipped on all ranks"):
        optimizer.step()
    assert_same_bits(facts(engine, optimizer), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(engine, 2, torch.bfloat16)
        optimizer.step()
    assert not torch.equal(values_of(engine)[0], before[0][0])
    assert engine.counters.skipped == 1


@scenario
def finite_gradients_with_infinite_squares_are_finite() -> None:
    for dtype, size in ((torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float64, 1e200)):
        model = nn.Linear(4, 4, bias=False, dtype=dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1 / size, foreach=False)
        engine = shard(model, [optimizer], group=group())
        before = values_of(engine)[0]
        for _ in range(2):
            (model(torch.ones(2, 4, dtype=dtype)).sum() * size).backward()
            optimizer.step()
        torch.testing.assert_close(values_of(engine)[0], before - 4, rtol=2e-2, atol=1e-5)
        assert engine.counters.skipped == 0


class _Counting(Optimizer):
    """Keeps a step count in its group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (settings,) = self.param_groups
        settings["step"] += 1
        for param in settings["params"]:
            if param.grad is not None:
                param.sub_(param.grad, alpha=settings["lr"] / settings["step"])


@scenario
def a_skipped_step_is_not_counted_in_the_groups() -> None:
    """GradScaler does not call the optimizer at all."""
    engine, optimizer = built(_Counting, LossScale(SCALE))
    backward(engine, 0, a=HUGE)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 0


@scenario
def an_infinite_loss_is_skipped_where_chunks_move() -> None:
    """As where they are kept: the loss of an fp16 model overflows as its gradients do."""
    for home in (Home.FULL, Home.HOST):
        scale = LossScale(SCALE)
        engine, optimizer = built(RULED, scale, home=home)
        for step in range(4):
            with engine.forward("training_step"):
                loss = engine.model(batch(step), a=float("inf") if step == 3 and last() else 1.0)
            engine.doubt(engine.scale(loss))
            with engine.backward():
                engine.scale(loss).backward()
            optimizer.step()
        assert scale.value == SCALE / 2, home


@scenario
def steps_without_gradients_do_not_count() -> None:
    scale = LossScale(SCALE, growth_interval=2)
    _, optimizer = built(scale=scale)
    for _ in range(4):
        optimizer.step()
    assert scale.value == SCALE


@scenario
def a_scale_does_not_outlive_its_backward() -> None:
    engine, optimizer = built(scale=LossScale(SCALE))
    norms = []
    for scaled in (True, False):
        loss = engine.model(batch(0))
        with engine.backward():
            (engine.scale(loss) if scaled else loss).backward()
        norms.append(engine.grad_norm())
        optimizer.zero_grad()
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", SCENARIOS)
def test_on_ranks(name: str, world_size: int) -> None:
    check(SCENARIOS[name], list(SCENARIOS.values()), world_size)
