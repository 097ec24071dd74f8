"""Memory beside chunks, as an accelerator's allocator tells it: planned for, noticed when it grows, refused in time."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_gemini.core import Engine, OutOfBudgetError, shard
from lightning_gemini.core.course import Course
from lightning_gemini.core.memory import MemoryProbe
from tests.outcomes import group
from tests.ranks import run_ranks

CHUNK = 1088 * 4


class Allocator(MemoryProbe):
    """Says what an allocator would that has given out the counted bytes and ``activations`` more."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(torch.device("cpu"))
        self.activations = 0
        self._tier = engine.store.device
        self._take = self._tier.take
        self._tier.take = self._counted  # type: ignore[method-assign]
        self._most = 0

    def _counted(self, nbytes: int, what: str, work: bool = False) -> None:
        self._take(nbytes, what, work)
        self._most = max(self._most, self._tier.used + self.activations)

    def reset(self) -> None:
        self._most = self._tier.used + self.activations

    def peak(self) -> int:
        return self._most


def make(device_memory: int) -> tuple[nn.Module, torch.optim.Optimizer, Engine, Allocator]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(12)))
    optimizer = torch.optim.AdamW(model.parameters())
    reduce_group = dist.new_group() if dist.is_initialized() else None
    engine = shard(
        model, [optimizer], group=group(), reduce_group=reduce_group, chunk_size=1088, device_memory=device_memory
    )
    engine._schedule.probe = allocator = Allocator(engine)
    return model, optimizer, engine, allocator


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 32)).square().mean().backward()
    optimizer.step()


def assert_planned(engine: Engine, activations: int, bound: int) -> None:
    (known,) = engine._schedule.playbook.known
    assert all(moment.other >= activations for moment in known.trace.moments)
    assert all(p + m.other <= bound for p, m in zip(known.plan.peak, known.trace.moments, strict=True))


def test_room_for_activations_is_taken_from_chunks() -> None:
    fetched = []
    for activations in (0, 4 * CHUNK):
        model, optimizer, engine, allocator = make(14 * CHUNK)
        allocator.activations = activations
        for _ in range(3):
            before = engine.counters.fetched_bytes
            step(model, optimizer)
        fetched.append(engine.counters.fetched_bytes - before)
        assert engine.counters.followed == 2
        assert not engine._schedule.grown
        assert_planned(engine, activations, 14 * CHUNK)
    assert fetched[0] < fetched[1]


def test_a_step_that_does_not_fit_is_refused_before_its_update() -> None:
    model, optimizer, engine, allocator = make(14 * CHUNK)
    with engine.summon():
        before = [p.detach().clone() for p in model.parameters()]
    allocator.activations = 13 * CHUNK
    with pytest.raises(
        OutOfBudgetError, match=r"even with all chunks in host memory[\s\S]*activations[\s\S]*a smaller b"
    ):
        step(model, optimizer)
    with engine.summon():
        assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    allocator.activations = 0
    for _ in range(2):
        step(model, optimizer)
    assert engine.counters.updates == 2 * 12


def test_a_step_that_grows_is_recorded_again_and_planned_for() -> None:
    model, optimizer, engine, allocator = make(14 * CHUNK)
    for _ in range(3):
        step(model, optimizer)
    allocator.activations = 5 * CHUNK
    step(model, optimizer)  # over the budget, which is noticed at its end
    courses = []
    model[0].register_forward_hook(lambda *_: courses.append(engine._schedule.course))
    for _ in range(3):
        step(model, optimizer)
    assert courses == [Course.RECORDING, Course.FOLLOWING, Course.FOLLOWING]
    assert_planned(engine, 5 * CHUNK, 14 * CHUNK)


def _one_rank_grows() -> list[str]:
    model, optimizer, engine, allocator = make(20 * CHUNK)
    courses = []
    model[0].register_forward_hook(lambda *_: courses.append(engine._schedule.course.name))
    for number in range(5):
        allocator.activations = 8 * CHUNK if dist.get_rank() == 1 and number >= 1 else 0
        step(model, optimizer)
    engine.release()
    return courses


def test_all_ranks_record_again_if_one_has_grown() -> None:
    ours, theirs = run_ranks(_one_rank_grows, 2)
    assert ours == theirs == ["RECORDING", "FOLLOWING", "RECORDING", "FOLLOWING", "FOLLOWING"]
