"""Mixed precision against a reference written by hand, step by step and over whole runs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core import DtypePolicy, Engine, Home, UpdatePolicy, shard
from lightning_gemini.optim import Lion
from lightning_gemini.optim.loss_scale import LossScale
from lightning_gemini.optim.masters import round_to_compute
from tests import cases
from tests.outcomes import group, rank, ranks
from tests.ranks import run_ranks

Make = Callable[[Any], Optimizer]

SPLIT = DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32)
WHOLE = DtypePolicy(torch.bfloat16, master="fp32", reduce=torch.float32)
HALF = DtypePolicy(torch.float16, master="fp32", reduce=torch.float32)
POLICIES = {"split": SPLIT, "fp32": WHOLE, "fp16": HALF}

#: elements, by the number of ranks: several chunks either way, and not too much to say to each other
CHUNK = {1: 4096, 2: 16384}

EPS = torch.finfo(torch.float32).eps


def ruled(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.003, weight_decay=0.1)


def as_it_is(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.003, weight_decay=0.1, foreach=False)


MAKERS = {"ruled": ruled, "as it is": as_it_is}


# Step by step: what the engine makes of its masters, states and gradients is what torch makes of them


class Reference:
    """A model in the compute dtype, and torch's own AdamW on fp32 masters; takes over the engine's at every step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = cases.build("opt").to(dtype)
        self.masters = [nn.Parameter(p.detach().float()) for p in self.model.parameters()]
        self.optimizer = as_it_is(self.masters)

    def take_over(self, values: list[Tensor], state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["state"]})
        for master, param, value in zip(self.masters, self.model.parameters(), values, strict=True):
            master.data.copy_(value)
            round_to_compute(value, param.data)

    def losses_and_grads(self, batches: list[Tensor], scale: float) -> tuple[list[Tensor], list[Tensor]]:
        """The means over ``batches``, averaged in fp32, kept in the compute dtype and unscaled."""
        losses, sums = [], [torch.zeros_like(master) for master in self.masters]
        for batch in batches:
            self.model.zero_grad()
            losses.append(cases.CASES["opt"].loss(self.model, batch))
            (losses[-1].float() * scale).backward()
            for total, param in zip(sums, self.model.parameters(), strict=True):
                total += param.grad
        dtype = next(self.model.parameters()).dtype
        return losses, [(total / len(batches)).to(dtype).float() / scale for total in sums]

    def step(self, grads: list[Tensor]) -> None:
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        self.optimizer.step()


def values_of(engine: Engine) -> list[Tensor]:
    with engine.summon():
        return [p.detach().clone() for p in engine.model.parameters()]


def assert_close(ours: Tensor, theirs: Tensor, scales: list[Tensor], ulps: int, what: str) -> None:
    """Equal to ``ulps`` roundings of fp32 numbers as large as the largest of ``scales``."""
    bound = torch.stack([one.abs() for one in scales]).amax(0) * EPS * ulps
    worst = ((ours - theirs).abs() - bound).max().item()
    assert worst <= 0, f"{what} is {worst:.3g} out of its bounds"


def parity(policy: str, maker: str, home: Home, steps: int) -> int:
    """Returns the number of steps that were skipped."""
    scale = LossScale(2.0**17, growth_interval=10) if policy == "fp16" else None
    model = cases.build("opt")
    optimizer = MAKERS[maker](model.parameters())
    engine = shard(
        model, [optimizer], group=group(), home=home, chunk_size=CHUNK[ranks()], policy=POLICIES[policy],
        update=UpdatePolicy(loss_scale=scale),
    )  # fmt: skip
    reference = Reference(POLICIES[policy].compute)
    names = [name for name, _ in model.named_parameters()]
    for step, batches in enumerate(cases.batches("opt", steps, ranks())):
        before, state = values_of(engine), engine.optimizer_state_dict(optimizer)
        value = 1.0 if scale is None else scale.value
        loss = cases.CASES["opt"].loss(model, batches[rank()])
        engine.scale(loss).backward()
        with engine.summon(with_grads=True):
            grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        after, new = values_of(engine), engine.optimizer_state_dict(optimizer)
        if rank():
            continue
        reference.take_over(before, state)
        losses, expected = reference.losses_and_grads(batches, value)
        assert torch.equal(loss, losses[0]), f"the loss of step {step}"
        for name, ours, theirs in zip(names, grads, expected, strict=True):
            assert torch.equal(ours, theirs) or not theirs.isfinite().all(), f"the gradient of {name} in step {step}"
        if not all(grad.isfinite().all() for grad in expected):
            assert scale is not None
            assert scale.value == value / 2
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
            continue
        reference.step(expected)
        compare(step, names, maker, before, after, new, reference)
    return engine.counters.skipped


def compare(
    step: int, names: list[str], maker: str, before: list[Tensor], after: list[Tensor], new: Any, reference: Reference
) -> None:
    """An update is at most a few roundings off: two of the weight, eight of the change and of what goes into states."""
    theirs = reference.optimizer.state_dict()["state"]
    for number, name in enumerate(names):
        ours, expected, old = after[number], reference.masters[number].detach(), before[number]
        mine, what = new["state"][number], f"{name} in step {step}"
        assert mine["step"] == theirs[number]["step"]
        if maker == "as it is":
            assert torch.equal(ours, expected), what
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(mine[key], theirs[number][key]), f"{key} of {what}"
            continue
        change = expected - old
        bound = torch.maximum(old.abs(), expected.abs()) * EPS * 2 + change.abs() * EPS * 8
        assert ((ours - expected).abs() <= bound).all(), what
        grad = reference.masters[number].grad
        for key, size in (("exp_avg", grad), ("exp_avg_sq", grad.square())):
            assert_close(mine[key], theirs[number][key], [size, theirs[number][key]], 4, f"{key} of {what}")


#: every home with a rule and without one, every kind of master
CONFIGURATIONS = [
    ("split", "ruled", Home.FULL),
    ("split", "as it is", Home.DEVICE),
    ("fp32", "ruled", Home.DEVICE),
    ("fp32", "as it is", Home.HOST),
    ("fp16", "ruled", Home.HOST),
    ("fp16", "as it is", Home.FULL),
]


@pytest.mark.parametrize(("policy", "maker", "home"), CONFIGURATIONS)
def test_each_of_many_steps_is_adamw_on_masters(policy: str, maker: str, home: Home) -> None:
    skipped = parity(policy, maker, home, 200 if maker == "ruled" else 60)
    assert (skipped > 0) == (policy == "fp16"), "the scale grows until it overflows, and only there"


def _parity_on_ranks(configurations: list[Any]) -> list[int]:
    return [parity(*one, steps=20) for one in configurations]


def test_each_step_is_adamw_on_masters_on_two_ranks() -> None:
    first, second = run_ranks(_parity_on_ranks, 2, [CONFIGURATIONS[0], CONFIGURATIONS[3], CONFIGURATIONS[4]])
    assert first == second


# The two kinds of masters


def long_run(policy: DtypePolicy, make: Make, home: Home, steps: int) -> list[Any]:
    """Clips, accumulates, has a schedule and unused parameters, and is looked at and averaged on the way."""
    model = cases.build("Unused")
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    engine = shard(model, [optimizer], group=group(), home=home, chunk_size=CHUNK[ranks()] // 2, policy=policy)
    average = engine.average()
    facts: list[Any] = []
    for step, batches in enumerate(cases.batches("Unused", steps, ranks())):
        loss = cases.CASES["Unused"].loss(model, batches[rank()].to(policy.compute))
        facts.append(loss.detach())
        if step % 3 == 0:
            with engine.accumulate():
                loss.backward()
            continue
        loss.backward()
        if step % 2:
            engine.clip_grad_value(optimizer, 0.01)
        else:
            facts.append(engine.clip_grad_norm(optimizer, 0.05))
        optimizer.step()
        scheduler.step()
        average.update(0.1)
        if step % 20 == 7:
            facts += values_of(engine)
            with engine.summon(writeback=True):
                next(model.parameters()).data.mul_(0.999)
        if step % 20 == 10:
            average.apply()
            facts.append(cases.CASES["Unused"].loss(model, batches[rank()].to(policy.compute)).detach())
            average.restore()
        if step % 20 == 13:
            state = engine.optimizer_state_dict(optimizer)
            facts.append(state)
            if ranks() == 1:
                engine.load_optimizer_state_dict(optimizer, state)
    facts += values_of(engine)
    facts.append(engine.optimizer_state_dict(optimizer))
    return facts


LONG: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.05),
    "AdamW as it is": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.05, foreach=False),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Lion": lambda p: Lion(p, lr=0.001, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def assert_same_bits(ours: Any, theirs: Any) -> None:
    pairs = list(zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), strict=True))
    assert pairs
    for number, (a, b) in enumerate(pairs):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, f"fact {number}"


def both_kinds(name: str, home: Home, steps: int) -> None:
    assert_same_bits(long_run(SPLIT, LONG[name], home, steps), long_run(WHOLE, LONG[name], home, steps))


@pytest.mark.parametrize("home", [Home.FULL, Home.HOST])
@pytest.mark.parametrize("name", LONG)
def test_split_and_whole_masters_are_the_same_run(name: str, home: Home) -> None:
    both_kinds(name, home, 150)


def _both_kinds_on_ranks() -> None:
    both_kinds("AdamW", Home.FULL, 100)
    both_kinds("NAdam", Home.DEVICE, 25)


def test_split_and_whole_masters_are_the_same_run_on_two_ranks() -> None:
    run_ranks(_both_kinds_on_ranks, 2)


def test_looking_on_changes_nothing() -> None:
    """The masters behind a run that is summoned, averaged and saved on the way are those of one that is not."""

    def run(look: bool) -> list[Tensor]:
        model = cases.build("Unused")
        optimizer = LONG["AdamW"](model.parameters())
        engine = shard(model, [optimizer], home=Home.FULL, chunk_size=2048, policy=SPLIT)
        for (batch,) in cases.batches("Unused", 30, 1):
            cases.CASES["Unused"].loss(model, batch.bfloat16()).backward()
            if look:
                with engine.summon(with_grads=True):
                    pass
                engine.grad_norm()
                engine.grad_norms()
            optimizer.step()
            if look:
                average = engine.average()
                average.update(0.5)
                average.apply()
                average.restore()
                average.release()
                with engine.summon(writeback=True):
                    pass
                engine.load_optimizer_state_dict(optimizer, engine.optimizer_state_dict(optimizer))
        return values_of(engine)

    assert_same_bits(run(True), run(False))


# Whole runs that are nobody's but their own


def free_run(mode: str, seed: int, steps: int = 120) -> float:
    """The mean loss of the last lap over eight batches."""
    torch.manual_seed(seed)
    model = cases.CASES["opt"].build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1)
    engine, scale = None, None
    if mode in POLICIES:
        scale = LossScale(2.0**12) if mode == "fp16" else None
        update = UpdatePolicy(loss_scale=scale)
        engine = shard(model, [optimizer], home=Home.FULL, policy=POLICIES[mode], update=update)
    laps, losses = itertools.cycle(cases.batches("opt", 8, 1)), []
    for (batch,) in itertools.islice(laps, steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = cases.CASES["opt"].loss(model, batch)
        (engine.scale(loss) if engine else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-8:]) / 8


def test_free_runs_end_where_fp32_and_autocast_do() -> None:
    results = {mode: [free_run(mode, seed) for seed in range(4)] for mode in ("plain", "autocast", "split", "fp16")}
    noise = statistics.stdev(results["plain"])
    assert max(results["plain"]) < 2.5, "it learns"
    for mode in ("split", "fp16"):
        for other in ("plain", "autocast"):
            distance = statistics.mean(results[mode]) - statistics.mean(results[other])
            assert abs(distance) < noise, (mode, other, results)
