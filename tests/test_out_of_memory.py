"""Memory that runs out: asked for again, planned for, and the end of a step on all ranks that changes nothing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gemini.core import Engine, OutOfBudgetError, StateError, StepFailedError, UpdatePolicy, shard
from lightning_gemini.core.errors import ended_together
from lightning_gemini.core.memory import Allocator
from tests.outcomes import group, rank, ranks
from tests.ranks import run_ranks

CHUNK = 1088 * 4
STEPS, FAILING = 6, 3

#: Where chunks are: everything stays, some have to move, nearly all have to.
PLACES: dict[str, dict[str, Any]] = {
    "kept": {},
    "auto": {"device_memory": 14 * CHUNK},
    "host": {"placement": "host", "device_memory": 16 * CHUNK},
}


class Refusing(Allocator):
    """Refuses one request, counted from when it is armed: the first time, or for good."""

    def __init__(self) -> None:
        self.armed, self.seen, self.refused = False, 0, 0
        self.number, self.for_good = -1, False
        self._request: Callable[[], Any] | None = None

    def run(self, make: Callable[[], Any]) -> Any:
        if not self.armed:
            return make()
        again = make is self._request
        if not again:
            self._request, number = make, self.seen
            self.seen += 1
            if number != self.number:
                return make()
        elif not self.for_good or self.refused == 0 or self.seen - 1 != self.number:
            return make()
        self.refused += 1
        raise torch.OutOfMemoryError("the device is full")


class Bomb(torch.autograd.Function):
    """Fails in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        raise ctx.error


class Trap(nn.Module):
    """Lets pass what comes, unless it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.where: str | None = None
        self.error: type[Exception] = torch.OutOfMemoryError

    def forward(self, x: Tensor) -> Tensor:
        recomputed = torch._C._current_graph_task_id() != -1
        if self.where == "forward" or (self.where == "recomputation" and recomputed):
            raise self.error("the device is full")
        return Bomb.apply(x, self.error("the device is full")) if self.where == "backward" else x


class Model(nn.Module):
    """Linear layers of one chunk each, with a trap between any two."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(count))
        self.traps = nn.ModuleList(Trap() for _ in range(count))

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        for layer, trap in zip(self.layers, self.traps, strict=True):
            block = nn.Sequential(layer, trap, nn.Tanh())
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return x


@dataclass(frozen=True)
class Case:
    """One run in which a step fails, or may."""

    place: str = "auto"
    where: str | None = None  # the model's own operation: forward, backward or recomputation
    trap: int = 2
    on: tuple[int, ...] = (0,)  # ranks
    error: type[Exception] = torch.OutOfMemoryError
    clip: bool = False
    micro: int | None = None  # the micro-batch that fails, of two
    optimizers: int = 1
    step: int = FAILING
    refuse: int | None = None  # the request to the allocator
    for_good: bool = False


@dataclass
class Run:
    """What has come of it."""

    values: list[Tensor] = field(default_factory=list)
    raised: list[Exception] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    requests: int = 0
    refused: int = 0
    capacity: int | None = None
    followed: int = 0


def make(case: Case) -> tuple[Model, list[torch.optim.Optimizer], Engine]:
    torch.manual_seed(0)
    model = Model()
    split = [model.layers[: 5 // case.optimizers], model.layers[5 // case.optimizers :]][: case.optimizers]
    if case.optimizers == 1:
        split = [model.layers]
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.01, foreach=False) for part in split]
    reduce_group = dist.new_group() if dist.is_initialized() else None
    options = {"chunk_size": 1088, **PLACES[case.place]}
    return model, optimizers, shard(model, optimizers, group=group(), reduce_group=reduce_group, **options)


def batch(number: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * number + 10 * micro + rank())
    return torch.randn(4, 32, generator=generator)


def step(case: Case, number: int, model: Model, optimizers: Sequence[torch.optim.Optimizer], engine: Engine) -> None:
    micros = 1 if case.micro is None else 2
    for micro in range(micros):
        mine = number == case.step and case.where is not None and rank() in case.on and micro == (case.micro or 0)
        model.traps[case.trap].where = case.where if mine else None
        model.traps[case.trap].error = case.error
        with engine.accumulate() if micro < micros - 1 else nullcontext():
            with engine.forward("training_step"):
                loss = model(batch(number, micro), case.where == "recomputation").square().mean()
            with engine.backward():
                loss.backward()
    if case.clip:
        engine.clip_grad_norm(optimizers[0], 0.1)
    for optimizer in optimizers:
        optimizer.step()


def train(case: Case, left_out: int | None = None) -> Run:
    """Trains on all batches, but for the one that is ``left_out``; a step that fails is not tried again."""
    run = Run()
    model, optimizers, engine = make(case)
    allocator = engine.store.device.allocator = Refusing()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(STEPS):
            if number == left_out:
                continue
            if number == case.step and rank() in case.on:
                allocator.armed, allocator.for_good = True, case.for_good
                allocator.number = -1 if case.refuse is None else case.refuse
            try:
                step(case, number, model, optimizers, engine)
            except Exception as error:
                if ranks() > 1 and not ended_together(error):
                    raise
                run.raised.append(error)
            allocator.armed = False
    run.warned = [str(one.message) for one in caught if "out of memory" in str(one.message)]
    run.requests, run.refused = allocator.seen, allocator.refused
    run.capacity, run.followed = engine.store.device.capacity, engine.counters.followed
    states = [engine.optimizer_state_dict(optimizer)["state"] for optimizer in optimizers]
    engine.release()
    assert engine.store.device.used == engine.store.host.used == 0
    tensors = [value for state in states for one in state.values() for value in one.values()]
    run.values = [p.detach().clone() for p in model.parameters()] + tensors
    return run


def same(ours: Run, theirs: Run) -> bool:
    return len(ours.values) == len(theirs.values) and all(map(torch.equal, ours.values, theirs.values))


class Expected:
    """Runs without a failure, each made once."""

    def __init__(self) -> None:
        self._runs: dict[tuple[Case, int | None], Run] = {}

    def of(self, case: Case, left_out: int | None) -> Run:
        plain = Case(
            place=case.place, clip=case.clip, micro=case.micro, optimizers=case.optimizers,
            step=case.step, on=(0, 1),
        )  # fmt: skip
        if (plain, left_out) not in self._runs:
            self._runs[plain, left_out] = train(plain, left_out)
        return self._runs[plain, left_out]


# The engine's own allocations


def _refuse_each(place: str, steps: Sequence[int]) -> list[tuple[Case, bool, int, int]]:
    """Each request of a step is refused, once and for good, on each rank; returns what became of each case."""
    expected, found = Expected(), []
    for number in steps:
        for on in range(ranks()):
            plain = expected.of(Case(place, step=number), None)
            requests = torch.tensor(plain.requests)
            if ranks() > 1:
                dist.broadcast(requests, src=on)
            assert requests > 0 or place == "kept"
            for request in range(int(requests)):
                # a step that is being recorded cannot be failed together
                for for_good in (False, True) if number or ranks() == 1 else (False,):
                    case = Case(place, step=number, on=(on,), refuse=request, for_good=for_good)
                    run = train(case)
                    failed = bool(run.raised)
                    assert all(type(error) is StepFailedError for error in run.raised), (case, run.raised)
                    assert same(run, expected.of(case, number if failed else None)), case
                    assert not failed or for_good
                    found.append((case, failed, len(run.warned), run.capacity or 0))
                    assert run.refused == 0 if rank() != on else run.refused > 0, case
    return found


@pytest.mark.parametrize("place", PLACES)
def test_each_request_of_a_step_is_refused_on_one_rank(place: str) -> None:
    found = _refuse_each(place, [0, FAILING])
    assert any(failed for _, failed, *_ in found)
    for case, _, warned, capacity in found:
        assert warned <= 1
        if PLACES[place] and warned and not case.for_good:
            assert capacity <= PLACES[place]["device_memory"] * 95 // 100


@pytest.mark.parametrize("place", PLACES)
def test_each_request_of_a_step_is_refused_on_one_of_two_ranks(place: str) -> None:
    ours, theirs = run_ranks(_refuse_each, 2, place, [0, FAILING] if place == "auto" else [FAILING])
    assert [one[:2] for one in ours] == [one[:2] for one in theirs]
    assert [capacity for *_, capacity in ours] == [capacity for *_, capacity in theirs]
    assert any(failed for _, failed, *_ in ours)
    assert any(warned for *_, warned, _ in ours)
    assert all(mine + other <= 1 for (*_, mine, _), (*_, other, _) in zip(ours, theirs, strict=True))


# The model's own operations

_MODEL_CASES = [
    Case(place, where, on=on, clip=on == (1,))
    for place in PLACES
    for where in ("forward", "backward", "recomputation")
    for on in ((0,), (1,), (0, 1))
]
_MODEL_CASES += [
    Case(place, where, on=on, micro=micro, clip=on == (0,))
    for place in PLACES
    for where in ("forward", "backward")
    for on in ((0,), (1,))
    for micro in (0, 1)
]
_MODEL_CASES += [Case(place, where, on=(0,), optimizers=2) for place in PLACES for where in ("forward", "backward")]
_MODEL_CASES += [
    Case(place, where, trap=trap, on=(1,))
    for place in PLACES
    for where, trap in (("forward", 0), ("forward", 4), ("backward", 1), ("backward", 3))
]
_MODEL_CASES += [Case(place, "forward", on=(1,), error=ValueError, clip=clip) for place in PLACES for clip in (0, 1)]


def _fail_each(cases: Sequence[Case]) -> list[list[str]]:
    expected, said = Expected(), []
    for case in cases:
        run = train(case)
        assert same(run, expected.of(case, case.step)), case
        assert len(run.raised) == 1, case
        said.append([f"{type(error).__name__}: {error}" for error in run.raised])
    return said


def test_the_models_own_operation_fails_on_one_of_two_ranks() -> None:
    ours, theirs = run_ranks(_fail_each, 2, _MODEL_CASES, timeout=170)
    for case, mine, other in zip(_MODEL_CASES, ours, theirs, strict=True):
        said = (mine[0], other[0])
        if case.error is ValueError:
            assert said[1] == "ValueError: the device is full"
            assert said[0] == "PeerError: rank 1 failed: ValueError: the device is full"
        else:
            assert said[0].startswith(f"StepFailedError: memory ran out on rank {case.on[0]} in ")
            if case.on != (0, 1):
                assert said[0] == said[1]
            assert "What helps:" in said[0]
            assert "unsharded chunks in use" in said[0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("where", ["forward", "backward", "recomputation"])
@pytest.mark.parametrize("number", [0, FAILING])
def test_the_models_own_operation_fails_on_one_rank(place: str, where: str, number: int) -> None:
    case = Case(place, where, step=number)
    run = train(case)
    (error,) = run.raised
    assert type(error) is StepFailedError
    assert isinstance(error, OutOfBudgetError)
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert "a smaller batch" in str(error)
    if place != "kept":
        assert re.search(r"layers\.[23]", str(error).partition("\n")[0])
    assert same(run, train(Case(place, step=number), number))


@pytest.mark.parametrize("place", PLACES)
def test_weights_that_were_updated_within_the_backward_are_torn(place: str) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    engine = shard(model, [optimizer], chunk_size=1088, update=UpdatePolicy("in_backward"), **PLACES[place])
    for where, trap, error in (("forward", 2, StepFailedError), (None, 0, None), ("backward", 0, OutOfBudgetError)):
        model.traps[trap].where = where
        with pytest.raises(error) if error is not None else nullcontext() as raised:
            with engine.forward("training_step"):
                loss = model(batch(0, 0)).square().mean()
            with engine.backward():
                loss.backward()
            optimizer.step()
        model.traps[trap].where = None
    assert type(raised.value) is OutOfBudgetError
    assert "training cannot go on" in str(raised.value)
    with pytest.raises(StateError, match="those of no step"), engine.forward("training_step"):
        model(batch(0, 0))
