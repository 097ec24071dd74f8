"""How long steps take by their plans: small cases by hand, and what holds for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.core.forecast import Forecast, Overlap, forecast
from lightning_gemini.core.planner import DoesNotFitError, plan
from lightning_gemini.core.speeds import Speeds, slowest
from lightning_gemini.core.trace import Trace
from tests.test_planner import Case, cases, chunk, evaluation, forward_backward

BESIDE = Overlap()
FREE = Speeds(math.inf, math.inf, None, math.inf, math.inf)
#: A chunk of 100 elements has 200 bytes.
SLOW_FETCH = replace(FREE, fetch=100)


def timed(trace: Trace, seconds: Sequence[float] | float = 1.0) -> Trace:
    every = [seconds] * len(trace.moments) if isinstance(seconds, float) else seconds
    return replace(trace, moments=tuple(replace(m, seconds=s) for m, s in zip(trace.moments, every, strict=True)))


def of(
    trace: Trace, speeds: Speeds, homes: str = "host", ranks: int = 1, overlap: Overlap = BESIDE, **options: int
) -> Forecast:
    """For chunks of 100 elements and moments of a second, with room for everything."""
    chunks = [chunk(100, ranks)] * (1 + max(trace.order))
    found = plan([trace], chunks, options.pop("device", None), None, homes=homes, **options)  # type: ignore[arg-type]
    return forecast(timed(trace), found.steps[0], found.on_device, chunks, speeds, overlap)


# By hand


def test_without_copies_and_updates_it_is_the_compute() -> None:
    found = of(forward_backward(3), FREE)
    assert (found.seconds, found.compute, found.waited_fetch, found.waited_update) == (6, 6, 0, 0)
    assert found.update_hidden_share is None


def test_one_chunk_goes_through_everything_in_turn() -> None:
    # 2 s of compute, its gradient leaves in 2, it is updated in 2, comes back in 2
    found = of(forward_backward(1), Speeds(100, 100, None, 50, math.inf))
    assert (found.seconds, found.compute, found.host_update) == (8, 2, 2)
    assert (found.waited_fetch, found.waited_update) == (4, 2)
    assert found.update_hidden_share == 0


#: Two chunks, a second for each update and two for each fetch, beside 4 s of compute. The backward is over at 0, say.
TWO = replace(SLOW_FETCH, host_update=100)


@pytest.mark.parametrize(
    ("overlap", "depth", "seconds", "waited_update"),
    [
        # updated at 1 and 2, there at 3 and 5; the second moment begins at 5, not at 4
        (Overlap(), None, 8, 1),
        # fetches begin as they are needed: from 1 to 3, from 4 to 6
        (Overlap(), 0, 9, 1),
        # both are updated at 2, there at 4 and 6
        (Overlap(updates=False), None, 9, 2),
        # the thread that updates copies: they are there at 3 and 4
        (Overlap(copies=False), None, 7, 1),
        (Overlap(copies=False, updates=False), None, 10, 2),
    ],
)
def test_what_waits_for_what(overlap: Overlap, depth: int | None, seconds: float, waited_update: float) -> None:
    found = of(forward_backward(2), TWO, overlap=overlap, depth=depth)  # type: ignore[arg-type]
    assert (found.seconds, found.waited_update, found.host_update) == (seconds, waited_update, 2)
    assert found.waited_fetch == seconds - 4 - waited_update
    assert found.update_hidden_share == 1 - waited_update / 2


def test_a_home_on_the_device_is_updated_by_the_compute_stream() -> None:
    found = of(forward_backward(2), replace(TWO, device_update=100), homes="device")
    assert (found.seconds, found.device_update, found.host_update, found.waited_fetch) == (6, 2, 0, 0)


def test_gathers_follow_their_fetches_and_go_by_turns() -> None:
    # on two ranks each brings 100 bytes from the host and 100 from the other, a second each
    speeds = replace(FREE, fetch=100, gather=100)
    assert of(forward_backward(2), speeds, ranks=2).waited_fetch == 2  # the second comes at 3, as the first is over
    assert of(forward_backward(2), speeds, ranks=2, homes="device").waited_fetch == 1
    assert of(forward_backward(2), replace(speeds, gather=25), ranks=2).waited_fetch == 5 + 3


def test_gradients_hold_up_the_next_step_where_no_update_follows() -> None:
    # the second chunk's leaves from 3 to 5, the first one's from 5 to 7; the backward is over at 4
    found = of(forward_backward(2, updates=False), replace(FREE, offload=100))
    assert (found.seconds, found.waited_fetch) == (7, 3)


def test_what_is_in_time_is_not_waited_for() -> None:
    # little room: each chunk comes while the one before it is used
    trace = evaluation(6)
    # but for the first one, which begins to come when the step before is over
    assert of(trace, replace(FREE, fetch=200), device=400).waited_fetch == 1
    assert of(trace, SLOW_FETCH, device=400).seconds == 2 * 6 + 1


def test_an_empty_step_takes_no_time() -> None:
    empty = plan([Trace("step", (), True)], [chunk(1)], None, None, homes="host")
    assert forecast(Trace("step", (), True), empty.steps[0], (False,), [chunk(1)], TWO).seconds == 0


# For all


def plans(case: Case, data: st.DataObject) -> tuple[Trace, Forecast, Speeds, Overlap, object]:
    homes = data.draw(st.tuples(*(st.booleans() for _ in case.chunks)))
    try:
        made = case.plan(homes)
    except DoesNotFitError:
        made = case.plan("host")
    seconds = data.draw(
        st.lists(
            st.sampled_from([0.0, 1.0, 2.5]), min_size=len(case.traces[0].moments), max_size=len(case.traces[0].moments)
        )
    )
    trace = timed(case.traces[0], seconds)
    speed = st.sampled_from([1.0, 3.0, 10.0, 100.0, math.inf])
    gather = data.draw(speed) if any(c.gather for c in case.chunks) else None
    speeds = Speeds(data.draw(speed), data.draw(speed), gather, data.draw(speed), data.draw(speed))
    overlap = Overlap(data.draw(st.booleans()), data.draw(st.booleans()))

    def at(speeds: Speeds) -> Forecast:
        return forecast(trace, made.steps[0], made.on_device, case.chunks, speeds, overlap)

    return trace, at(speeds), speeds, overlap, (at, made)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_no_step_is_shorter_than_any_one_thing_in_it(case: Case, data: st.DataObject) -> None:
    trace, found, speeds, overlap, (_, made) = plans(case, data)
    step, tiny = made.steps[0], 1 - 1e-9
    updated = [c for c in trace.uses if trace.updates]
    hosted = sum(case.chunks[c].elements for c in updated if not made.on_device[c]) / speeds.host_update
    near = sum(case.chunks[c].elements for c in updated if made.on_device[c]) / speeds.device_update
    assert (found.host_update, found.device_update) == pytest.approx((hosted, near))
    assert found.compute == pytest.approx(sum(moment.seconds for moment in trace.moments))
    lanes = [step.fetched / speeds.fetch, step.gathered / (speeds.gather or math.inf), hosted]
    lanes += [step.offloaded / speeds.offload] if overlap.copies else []
    assert found.seconds >= max(found.compute + near, *lanes) * tiny
    assert found.seconds == pytest.approx(found.compute + near + found.waited_fetch + found.waited_update)
    assert min(found.waited_fetch, found.waited_update) >= 0
    assert found.update_hidden_share is None or 0 <= found.update_hidden_share <= 1
    if not overlap.updates and hosted:
        assert found.seconds >= (found.compute + near + hosted) * tiny
    if not overlap.copies and not overlap.updates:
        assert found.seconds >= (found.compute + near + step.fetched / speeds.fetch) * tiny
    # and none is longer than all of it in turn
    total = found.compute + near + sum(lanes[:3]) + step.offloaded / speeds.offload
    assert found.seconds <= total * (1 + 1e-9)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_what_is_faster_makes_no_step_longer(case: Case, data: st.DataObject) -> None:
    _, found, speeds, _, (at, _) = plans(case, data)
    name = data.draw(st.sampled_from([f.name for f in fields(Speeds) if getattr(speeds, f.name) is not None]))
    faster = at(replace(speeds, **{name: getattr(speeds, name) * data.draw(st.sampled_from([1.1, 2, 50]))}))
    assert faster.seconds <= found.seconds * (1 + 1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_joined_moments_take_as_long(case: Case, data: st.DataObject) -> None:
    """The short form of a trace has the same room and the same uses, in fewer moments."""
    trace = case.traces[0]
    doubled = replace(trace, moments=tuple(m for moment in trace.moments for m in (moment, moment)))
    trace, doubled = timed(trace), timed(doubled, 0.5)
    if any(len(moment.pinned) > 1 for moment in trace.moments):
        return
    assert doubled.condensed.condensed == doubled.condensed == trace.condensed


# Speeds


def test_the_slowest_rank_counts() -> None:
    one, other = Speeds(1, 5, 3, 9, 2), Speeds(2, 4, 7, 8, math.inf)
    assert slowest([one, other]) == Speeds(1, 4, 3, 8, 2)
    assert slowest([FREE]) == FREE
    with pytest.raises(ValueError, match="got none"):
        slowest([])


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_speeds_are_positive(wrong: float) -> None:
    with pytest.raises(ValueError, match="host_update must be at least 1"):
        replace(FREE, host_update=wrong)
