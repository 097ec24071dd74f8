"""Which recorded step comes next, and which are remembered; and which way a step may go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_gemini.core import Home, StateError, shard
from lightning_gemini.core.course import Course
from lightning_gemini.core.playbook import Known, Playbook
from lightning_gemini.core.step_plan import StepPlan
from lightning_gemini.core.trace import Moment, Trace


def trace(*order: int, kind: str = "step", updates: bool = True) -> Trace:
    return Trace(kind, tuple(Moment(chunk, "a unit", False, (chunk,)) for chunk in order), updates)


def planned(playbook: Playbook, *order: int, kind: str = "step") -> Known:
    known = playbook.add(trace(*order, kind=kind))
    known.plan = StepPlan((), ((),) * len(order), ((),) * len(order), 0, 0, 0, 0, (0,) * len(order))
    return known


def test_the_same_step_is_expected_until_another_follows_it() -> None:
    playbook = Playbook()
    assert playbook.expect("step") is None
    first = planned(playbook, 0, 1, 2)
    assert playbook.expect("step") is playbook.expect() is first
    second = planned(playbook, 0, 2)
    playbook.followed(first)
    assert playbook.expect() is second  # they take turns
    playbook.followed(second)
    assert playbook.expect() is first


def test_steps_are_timed_from_one_beginning_to_the_next_if_they_went_as_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("lightning_gemini.core.playbook.time.perf_counter", lambda: now)
    playbook = Playbook()
    known = planned(playbook, 0, 1)
    for seconds in (1.0, 2.0, 50.0, 3.0, 2.0):
        assert playbook.begin("step") is known
        playbook.followed(known)
        now += seconds
    playbook.begin("step")  # this one goes otherwise
    now += 9.0
    playbook.begin("step")
    assert list(known.times) == [1.0, 2.0, 50.0, 3.0, 2.0]
    assert known.measured == 2.0


def test_times_are_kept_where_planning_anew_finds_the_same_plan() -> None:
    playbook = Playbook()
    known = planned(playbook, 0, 1)
    plan = known.plan
    assert plan is not None
    known.times.append(2.0)
    known.go_by(replace(plan), None)  # as when another kind of step has been recorded
    assert known.measured == 2.0
    known.go_by(replace(plan, start=(0,)), None)
    assert known.measured is None


def test_a_kind_is_met_again_after_another_one() -> None:
    playbook = Playbook()
    train, evaluate = planned(playbook, 0, 1), planned(playbook, 0, kind="validation")
    assert playbook.expect("step") is train
    assert playbook.expect("validation") is evaluate
    assert playbook.expect("test") is None


def test_a_step_is_found_by_its_beginning_the_one_met_last_first() -> None:
    playbook = Playbook()
    first, second = planned(playbook, 0, 1, 2), planned(playbook, 0, 1, 3)
    assert playbook.with_order("step", [0, 1]) is second
    assert playbook.with_order("step", [0, 1, 2]) is first
    assert playbook.with_order("step", [0, 3]) is None
    assert playbook.with_order("validation", [0]) is None


def test_a_step_that_is_recorded_again_is_the_same_one() -> None:
    playbook = Playbook()
    first = planned(playbook, 0, 1)
    again = trace(0, 1)
    assert playbook.add(again) is first
    assert first.trace is again
    assert playbook.known == (first,)


def test_recording_is_given_up_where_no_step_is_met_again() -> None:
    playbook = Playbook()
    for last in range(6):
        assert playbook.worth_recording("step")
        known = planned(playbook, 0, last + 1)
    assert not playbook.worth_recording("step")
    assert playbook.worth_recording("validation")
    playbook.followed(known)
    assert playbook.worth_recording("step")


def test_the_step_met_longest_ago_is_forgotten() -> None:
    playbook = Playbook()
    every = [planned(playbook, 0, last) for last in range(1, 17)]
    playbook.followed(every[0])
    planned(playbook, 0, 17)
    assert len(playbook.known) == 16
    assert every[0] in playbook.known
    assert every[1] not in playbook.known


def test_a_step_that_grew_is_recorded_again() -> None:
    playbook = Playbook()
    planned(playbook, 0, 1)
    playbook.lost("step")
    assert playbook.expect("step") is None
    known = planned(playbook, 0, 1)
    assert playbook.expect("step") is known


def test_what_is_unsharded_at_a_moment_follows_from_the_plan() -> None:
    known = Known(trace(0, 1, 2), StepPlan((0,), ((), (), (0,)), ((1,), (2,), ()), 0, 0, 0, 0, (0, 0, 0)))
    assert [known.resident(at) for at in range(4)] == [{0}, {0, 1}, {0, 1, 2}, {1, 2}]


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))


def test_courses_of_a_step() -> None:
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = shard(model, [optimizer], home=Home.HOST, chunk_size=1088)
    seen = []
    model[3].register_forward_pre_hook(lambda *_: seen.append(engine._schedule.course))

    def step(layers: list[int]) -> None:
        x = torch.ones(2, 32)
        for index in layers:
            x = model[index](x)
        seen.append(engine._schedule.course)
        x.sum().backward()
        optimizer.step()
        assert engine._schedule.course is Course.NONE

    for layers in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 3, 5], [0, 1, 3, 5], [0, 1, 2, 3, 4]):
        step(layers)
    follows, astray = Course.FOLLOWING, Course.ASTRAY
    assert seen == [Course.RECORDING] * 2 + [follows] * 2 + [astray] * 2 + [follows] * 4
    assert (engine.counters.followed, engine.counters.strayed) == (3, 1)
    with pytest.raises(StateError, match="a step cannot go from NONE to NONE"):
        engine._schedule._go(Course.NONE)
    engine._schedule._go(Course.RECORDING)
    for wrong in (Course.FOLLOWING, Course.ASTRAY, Course.RECORDING):
        with pytest.raises(StateError, match=f"from RECORDING to {wrong.name}"):
            engine._schedule._go(wrong)
    engine._schedule._go(Course.NONE)
    engine.release()
