"""A plan can be executed as it stands, moves the bytes it says, and its homes are nearly the best."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.core.errors import GeminiError
from lightning_gemini.core.forecast import forecast
from lightning_gemini.core.homes import nested_homes, search_homes
from lightning_gemini.core.planner import DoesNotFitError, plan
from lightning_gemini.core.speeds import Speeds
from lightning_gemini.core.step_plan import ChunkBytes, Plan
from lightning_gemini.core.trace import Trace
from tests.simulator import simulate
from tests.test_residency import trace_of


def chunk(numel: int, ranks: int = 1, trained: bool = True) -> ChunkBytes:
    """A bf16 chunk with a split master and Adam's states in fp32, as one of ``ranks`` ranks has it."""
    kept = (14 if trained else 2) * numel // ranks
    return ChunkBytes(
        full=2 * numel,
        kept=kept,
        hosted=kept,
        fetch=2 * numel // ranks,
        gather=2 * numel * (ranks - 1) // ranks,
        offload=2 * numel // ranks if trained else 0,
        trained=trained,
        whole=ranks == 1,
        elements=numel // ranks if trained else 0,
    )


def forward_backward(chunks: int, units: int = 1, updates: bool = True, other: int = 0) -> Trace:
    """Each chunk ``units`` times in forward order, then the same backwards."""
    order = [index for index in range(chunks) for _ in range(units)]
    trace = trace_of([*order, *reversed(order)], updates=updates, turn=len(order))
    return replace(trace, moments=tuple(replace(moment, other=other) for moment in trace.moments))


def evaluation(chunks: int) -> Trace:
    return replace(trace_of(range(chunks), updates=False), kind="validation_step")


@dataclass(frozen=True)
class Case:
    traces: tuple[Trace, ...]
    chunks: tuple[ChunkBytes, ...]
    device: int | None
    window: int | None
    depth: int | None

    def plan(self, homes: str | Sequence[bool], host: int | None = None, speeds: Speeds | None = None) -> Plan:
        options = {"homes": homes, "window": self.window, "depth": self.depth, "speeds": speeds}
        return plan(self.traces, self.chunks, self.device, host, **options)  # type: ignore[arg-type]

    def check(self, found: Plan) -> None:
        """Executes the plan."""
        for trace, step in zip(self.traces, found.steps, strict=True):
            done = simulate(trace, self.chunks, found.on_device, step, 3, self.device, self.window)
            assert (done.fetched, done.gathered, done.offloaded) == (step.fetched, step.gathered, step.offloaded)
            assert tuple(done.peak) == step.peak
            assert step.least <= step.fetched + step.gathered
            if self.depth == 0:
                assert not any(step.prefetch)
            elif self.depth is not None:
                kept = sum(1 for index in step.start if not _comes_back(trace, self.chunks, index))
                assert done.waiting <= self.depth + kept


def _comes_back(trace: Trace, chunks: Sequence[ChunkBytes], index: int) -> bool:
    return trace.updates and chunks[index].trained


def smallest(traces: Sequence[Trace], chunks: Sequence[ChunkBytes]) -> int:
    """The device memory that no plan can do without."""
    moments = [moment for trace in traces for moment in trace.moments]
    return max(sum(chunks[c].full for c in moment.pinned) + moment.other for moment in moments)


@st.composite
def cases(draw: st.DrawFn, most_chunks: int = 6) -> Case:
    count, ranks = draw(st.integers(2, most_chunks)), draw(st.sampled_from([1, 1, 2, 4]))
    chunks = tuple(
        chunk(4 * draw(st.integers(1, 4)), ranks, draw(st.sampled_from([True, True, False]))) for _ in range(count)
    )
    traces = []
    for _ in range(draw(st.integers(1, 2))):
        length = draw(st.integers(1, 8))
        order = draw(st.lists(st.integers(0, count - 1), min_size=length, max_size=length))
        order += draw(st.sampled_from([[], order[::-1]]))
        held = draw(st.lists(st.sampled_from([0, 0, 1, 3]), min_size=len(order), max_size=len(order)))
        trace = trace_of(order, held, draw(st.booleans()), draw(st.sampled_from([None, length])))
        other = draw(st.lists(st.sampled_from([0, 0, 8, 40]), min_size=len(order), max_size=len(order)))
        moments = zip(trace.moments, other, strict=True)
        traces.append(replace(trace, moments=tuple(replace(moment, other=nbytes) for moment, nbytes in moments)))
    least, most = smallest(traces, chunks), sum(c.kept + c.full for c in chunks)
    device = draw(st.sampled_from([None, *(least + most * part // 16 for part in (0, 0, 1, 2, 3, 4, 6, 8, 12, 16))]))
    window = draw(st.sampled_from([None, None, None, 0, 16, 64]))
    return Case(tuple(traces), chunks, device, window, draw(st.sampled_from([None, None, 0, 1, 2])))


# Plans can be executed


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_a_plan_is_what_happens(case: Case, data: st.DataObject) -> None:
    homes = data.draw(st.tuples(*(st.booleans() for _ in case.chunks)))
    for one in ("auto", "host", homes):
        try:
            found = case.plan(one)
        except DoesNotFitError:
            assert one == homes, "the others always fit"
            continue
        case.check(found)
        assert one == "auto" or found.on_device == (one if one == homes else (False,) * len(case.chunks))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_auto_is_never_worse_than_host_and_halving_the_device_never_fails(case: Case) -> None:
    least = smallest(case.traces, case.chunks)
    device = case.device or 4 * sum(c.kept + c.full for c in case.chunks)
    counted = [i for i, trace in enumerate(case.traces) if trace.updates] or list(range(len(case.traces)))
    while device >= least:
        smaller = replace(case, device=device)
        auto, host = smaller.plan("auto"), smaller.plan("host")
        assert sum(auto.steps[i].fetched for i in counted) <= sum(host.steps[i].fetched for i in counted)
        assert sum(auto.steps[i].moved for i in counted) <= sum(host.steps[i].moved for i in counted)
        device //= 2
    with pytest.raises(DoesNotFitError) as error:
        replace(case, device=least - 1).plan("auto")
    assert (error.value.needed, error.value.available, error.value.budget) == (least, least - 1, "device")
    assert error.value.trace is not None
    moment = case.traces[error.value.trace].moments[error.value.moment or 0]
    assert sum(case.chunks[c].full for c in moment.pinned) + moment.other == least


#: How far from the best homes those that are found may be on such small instances. Nothing is proved; in 12,000
#: random ones 0.4% were not the best, by at most twice.
HOMES_FACTOR = 2


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(most_chunks=5))
def test_homes_are_nearly_the_best(case: Case) -> None:
    counted = [i for i, trace in enumerate(case.traces) if trace.updates] or list(range(len(case.traces)))
    totals = []
    for homes in product((False, True), repeat=len(case.chunks)):
        try:
            totals.append(sum(case.plan(homes).steps[i].moved for i in counted))
        except DoesNotFitError:
            continue
    assert sum(case.plan("auto").steps[i].moved for i in counted) <= HOMES_FACTOR * min(totals)


# What one expects of them


def test_with_room_for_everything_nothing_moves() -> None:
    # two of them are in none of the traces
    chunks, trace = [chunk(100)] * 6, forward_backward(4, other=50)
    for device in (None, 6 * 1400 + 50):
        found = plan([trace, evaluation(4)], chunks, device, None, homes="auto")
        assert found.on_device == (True,) * 6
        assert all(step.moved == step.least == 0 for step in found.steps)
        assert all(not step.start and not any(step.evict) and not any(step.prefetch) for step in found.steps)
        assert set(found.steps[0].peak) == {8400}


def test_residency_through_the_turn_comes_before_homes() -> None:
    # 10 chunks of 200 bytes; a home takes 1400. With 2000 bytes for chunks everything stays through the turn
    chunks, trace = [chunk(100)] * 10, forward_backward(10)
    found = plan([trace], chunks, 2000, None, homes="auto")
    assert not any(found.on_device)
    assert found.steps[0].fetched == found.steps[0].least == 2000
    assert found.steps[0].offloaded == 2000
    # each further home takes 1200 more, since it is an unsharded chunk itself
    for homes in range(11):
        more = plan([trace], chunks, 2000 + 1200 * homes, None, homes="auto")
        assert sum(more.on_device) == homes
        assert more.steps[0].moved == 400 * (10 - homes)


def test_on_several_ranks_a_home_on_the_device_still_gathers() -> None:
    chunks, trace = [chunk(100, ranks=2)] * 4, forward_backward(4)
    found = plan([trace], chunks, None, None, homes="auto")
    assert found.on_device == (True,) * 4
    step = found.steps[0]
    assert (step.fetched, step.gathered, step.offloaded) == (0, 400, 0)
    assert step.start == (0, 1, 2, 3)


def test_frozen_chunks_are_kept_for_good_and_trained_ones_wait_for_the_next_step() -> None:
    chunks = [chunk(100), chunk(100, trained=False), chunk(100, trained=False)]
    found = plan([forward_backward(3)], chunks, 600, None, homes="host")
    assert found.steps[0].start == (0, 1, 2)
    assert found.steps[0].fetched == 200, "only what was updated comes again"
    accumulating = plan([forward_backward(3, updates=False)], chunks, 600, None, homes="host")
    assert accumulating.steps[0].fetched == 0
    assert accumulating.steps[0].offloaded == 200


def test_a_tight_evaluation_keeps_what_it_can_and_fetches_ahead() -> None:
    found = plan([evaluation(5)], [chunk(100)] * 5, 600, None, homes="host")
    step = found.steps[0]
    # in use, under way, and one that stays
    assert step.fetched == 800
    assert set(step.peak) <= {400, 600}
    done = simulate(evaluation(5), [chunk(100)] * 5, found.on_device, step, device=600)
    assert not any(done.late)


def test_the_next_chunk_is_under_way_while_one_is_used() -> None:
    trace, chunks = forward_backward(12, units=3), [chunk(100)] * 12
    for device, depth in product((400, 600, 1000, 2400), (None, 1, 2)):
        found = plan([trace], chunks, device, None, homes="host", depth=depth)
        done = simulate(trace, chunks, found.on_device, found.steps[0], device=device)
        assert not any(done.late), "no chunk has to be waited for from its need on"
        assert done.waiting <= (depth or 12)


def test_a_window_leaves_the_device_nearly_empty() -> None:
    trace, chunks = forward_backward(8), [chunk(100)] * 8
    found = plan([trace], chunks, 10**6, None, homes="host", window=200)
    assert max(found.steps[0].peak) == 400
    assert not any(found.on_device)


def test_the_host_budget_pushes_homes_to_the_device() -> None:
    trace, chunks = forward_backward(8), [chunk(100)] * 8
    free = plan([trace], chunks, 3000, None, homes="auto")
    tight = plan([trace], chunks, 3000, 6 * 1400, homes="auto")
    assert (sum(free.on_device), sum(tight.on_device)) == (1, 2)
    assert tight.steps[0].moved > free.steps[0].moved, "at the price of residency"
    with pytest.raises(DoesNotFitError, match="host memory") as error:
        plan([trace], chunks, 3000, 5000, homes="auto")
    assert (error.value.budget, error.value.needed, error.value.available) == ("host", 6 * 1400, 5000)
    assert error.value.trace is None
    with pytest.raises(DoesNotFitError, match="host memory"):
        plan([trace], chunks, 3000, 8 * 1400 - 1, homes="host")
    assert isinstance(error.value, GeminiError)


def test_everything_on_the_device_has_to_fit() -> None:
    with pytest.raises(DoesNotFitError, match=r"1\.32 KiB of device memory .* in moment 1 of trace 0") as error:
        plan([trace_of([0, 1], [0, 1])], [chunk(50, ranks=2), chunk(450, ranks=2)], 1000, None, homes=[True, False])
    assert error.value.needed == 350 + 100 + 900


@pytest.mark.parametrize("homes", [[True], [True] * 3, "everywhere"])
def test_homes_must_be_of_all_chunks(homes: Sequence[bool] | str) -> None:
    with pytest.raises(ValueError, match="for each"):
        plan([forward_backward(2)], [chunk(1)] * 2, None, None, homes=homes)  # type: ignore[arg-type]


def test_no_chunks_and_no_moments() -> None:
    empty = plan([], [], None, None, homes="auto")
    assert empty == Plan((), ())
    found = plan([Trace("test_step", (), False)], [chunk(1)], 0, None, homes="auto")
    assert found.steps[0].peak == ()
    assert found.on_device == (False,)


def test_frozen_chunks_compete_for_homes() -> None:
    # a home takes 1400 bytes for either; the frozen chunk is the one that costs more to bring
    chunks = [chunk(700, trained=False), chunk(100)]
    found = plan([forward_backward(2)], chunks, 1400 + 200, None, homes="auto")
    assert found.on_device == (True, False)


def test_a_large_model_takes_seconds() -> None:
    trace = forward_backward(64, units=12)
    chunks = [chunk(1000 + 37 * index % 11) for index in range(64)]
    device = 14 * 1000 * 64 // 3
    start = time.process_time()
    found = plan([trace, evaluation(64)], chunks, device, None, homes="auto")
    assert time.process_time() - start < 20, "some ten times what it takes on an idle machine"
    assert 0 < sum(found.on_device) < 64
    Case((trace,), tuple(chunks), device, None, None).check(Plan(found.on_device, found.steps[:1]))


@pytest.mark.parametrize("unused", [0, 30])
def test_a_small_home_that_is_worth_more_per_byte_gives_way_to_a_large_one(unused: int) -> None:
    chunks = [chunk(100), chunk(400), *[chunk(10**6)] * unused]
    found = plan([trace_of([0, 1, 0, 1, 0], turn=3)], chunks, 400 * 14 + 200, None, homes="auto")
    assert found.on_device[:2] == (False, True)
    assert found.steps[0].moved == 400


def test_homes_do_not_save_offloads_at_the_price_of_fetches() -> None:
    chunks = [ChunkBytes(100, 400, 400, fetch=100, gather=0, offload=1000, trained=True, whole=True)] * 4
    found = plan([forward_backward(4)], chunks, 500, None, homes="auto")
    assert not any(found.on_device)
    assert found.steps[0].fetched == 400
    forced = plan([forward_backward(4)], chunks, 500, None, homes=[True, False, False, False])
    assert forced.steps[0].moved < found.steps[0].moved
    assert forced.steps[0].fetched > found.steps[0].fetched


# By time


def timed(trace: Trace, seconds: float) -> Trace:
    return replace(trace, moments=tuple(replace(moment, seconds=seconds) for moment in trace.moments))


def seconds(case: Case, found: Plan, speeds: Speeds) -> float:
    """Predicted, of the traces that count."""
    counted = [i for i, trace in enumerate(case.traces) if trace.updates] or list(range(len(case.traces)))
    pairs = [(case.traces[i], found.steps[i]) for i in counted]
    return sum(forecast(*pair, found.on_device, case.chunks, speeds).seconds for pair in pairs)


#: Beside 10 chunks of 200 bytes in 20 moments of a second: everything else is done at once.
AT_ONCE = Speeds(1e9, 1e9, None, 1e9, 1e9)


def test_slow_updates_in_host_memory_bring_homes_to_the_device_though_more_bytes_move() -> None:
    # a home and what stays through the turn compete for 3000 bytes; by bytes the latter wins
    trace, chunks = timed(forward_backward(10), 1.0), [chunk(100)] * 10
    fewest = plan([trace], chunks, 3000, None, homes="auto")
    assert sum(fewest.on_device) == 0
    slow_updates = replace(AT_ONCE, host_update=20)
    slow = plan([trace], chunks, 3000, None, homes="auto", speeds=slow_updates)
    assert sum(slow.on_device) == 2
    assert slow.steps[0].moved > fewest.steps[0].moved
    # where copies are slow, too, memory is worth more for what stays unsharded
    both = plan([trace], chunks, 3000, None, homes="auto", speeds=replace(slow_updates, fetch=20))
    assert both.steps[0].fetched == fewest.steps[0].fetched < slow.steps[0].fetched
    assert sum(both.on_device) < 2


def test_where_all_is_hidden_no_more_bytes_move() -> None:
    trace, chunks = timed(forward_backward(10), 1.0), [chunk(100)] * 10
    for device in (1000, 3000, 8000, 20000):
        found = plan([trace], chunks, device, None, homes="auto", speeds=AT_ONCE)
        assert found.steps[0].moved <= plan([trace], chunks, device, None, homes="auto").steps[0].moved


@st.composite
def timed_cases(draw: st.DrawFn, most_chunks: int = 5) -> tuple[Case, Speeds]:
    case = draw(cases(most_chunks))
    speed = st.sampled_from([2.0, 10.0, 50.0, 1e9])
    gather = draw(speed) if any(c.gather for c in case.chunks) else None
    speeds = Speeds(draw(speed), draw(speed), gather, draw(speed), 1e9)
    return replace(case, traces=tuple(timed(trace, draw(st.sampled_from([0.1, 1.0]))) for trace in case.traces)), speeds


#: How much longer than with the best homes a step may take on such small instances. Nothing is proved; in 4,000
#: random ones 0.1% were not the best, by at most 18%.
SECONDS_FACTOR = 1.2


@settings(max_examples=150, deadline=None, derandomize=True)
@given(timed_cases())
def test_homes_by_time_are_nearly_the_best_and_never_worse_than_by_bytes(instance: tuple[Case, Speeds]) -> None:
    case, speeds = instance
    found = case.plan("auto", speeds=speeds)
    case.check(found)
    took, alike = seconds(case, found, speeds), 1.02
    assert took <= alike * seconds(case, case.plan("auto"), speeds)
    every = []
    for homes in product((False, True), repeat=len(case.chunks)):
        try:
            every.append(seconds(case, case.plan(homes), speeds))
        except DoesNotFitError:
            continue
    assert took <= SECONDS_FACTOR * min(every)


def test_by_time_nothing_is_refused_that_fits_otherwise() -> None:
    trace, chunks, speeds = timed(forward_backward(8), 1.0), [chunk(100)] * 8, replace(AT_ONCE, host_update=20)
    for host in (8 * 1400, 6 * 1400):
        found = plan([trace], chunks, 3000, host, homes="auto", speeds=speeds)
        assert sum(not home for home in found.on_device) * 1400 <= host
        Case((trace,), tuple(chunks), 3000, None, None).check(found)
    with pytest.raises(DoesNotFitError, match="host memory"):
        plan([trace], chunks, 3000, 5000, homes="auto", speeds=speeds)


@pytest.mark.parametrize("share", [1.2, 3, 8])
@pytest.mark.parametrize("host_update", [1e3, 1e5])
def test_a_large_model_by_time_takes_a_moment(share: float, host_update: float) -> None:
    trace = timed(forward_backward(64, units=12), 1e-3)
    chunks, device = [chunk(1000 + 37 * index % 11) for index in range(64)], int(14 * 1000 * 64 / share)
    speeds = Speeds(1e6, 1e6, None, host_update, 1e7)
    start = time.process_time()
    found = plan([trace], chunks, device, None, homes="auto", speeds=speeds)
    assert time.process_time() - start < 3, "some ten times what it takes on an idle machine"
    Case((trace,), tuple(chunks), device, None, None).check(found)


# The search alone


@pytest.mark.parametrize("count", [1, 5, 24, 25, 60, 300])
def test_the_search_finds_the_bottom_of_a_valley(count: int) -> None:
    order = list(range(count))
    for bottom in {0, 1, count // 3, count - 1, count}:
        rated = []

        def rate(homes: tuple[bool, ...], bottom: int = bottom) -> tuple[int]:
            rated.append(homes)  # noqa: B023
            return (abs(sum(homes) - bottom),)

        found = search_homes([order], lambda homes: True, lambda homes: True, rate)
        assert sum(found[0]) == bottom
        assert len(rated) == len(set(rated)) <= 60, "nothing is rated twice, and not everything"


def test_a_pair_changes_places_where_the_device_is_full() -> None:
    size, worth = (6, 5, 5), (8, 6, 9)

    def total(numbers: Sequence[int], homes: Sequence[bool]) -> int:
        return sum(number for number, home in zip(numbers, homes, strict=True) if home)

    found = search_homes(
        [[0, 1, 2]], lambda homes: total(size, homes) < 10, lambda homes: True, lambda homes: (-total(worth, homes),)
    )
    assert found[0] == (False, False, True)


def test_nested_homes_skip_what_does_not_fit() -> None:
    size = [5, 3, 9, 1]
    fits = lambda homes: sum(s for s, home in zip(size, homes, strict=True) if home) <= 9  # noqa: E731
    found = nested_homes([1, 0, 2, 3], fits)
    assert [[index for index, home in enumerate(homes) if home] for homes in found] == [[], [1], [0, 1], [0, 1, 3]]
    assert search_homes([[0, 1]], lambda homes: True, lambda homes: False, lambda homes: (0,)) == []
