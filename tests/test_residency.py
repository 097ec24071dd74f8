"""What stays unsharded is never too much, nearly the cheapest, and comes back in time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_gemini.core.residency import Gap, Gaps, choose_kept, find_gaps, lower_bound, prefetch_starts
from lightning_gemini.core.trace import Moment, Trace, merge

#: What all choices of kept gaps are tried for.
_MOST_GAPS = 11


@dataclass(frozen=True)
class Instance:
    trace: Trace
    gaps: Gaps
    room: tuple[int, ...]
    size: tuple[int, ...]
    cost: tuple[int, ...]

    def arguments(self) -> tuple[Gaps, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.gaps, self.room, self.size, self.cost


def trace_of(order: Sequence[int], kept: Sequence[int] = (), updates: bool = True, turn: int | None = None) -> Trace:
    """A trace whose moments begin with the chunks of ``order``.

    The bits of ``kept[t]`` say which chunks of the moment before are still in use in moment t; from ``turn`` on the
    moments are those of a backward.
    """
    moments: list[Moment] = []
    for t, chunk in enumerate(order):
        before = moments[-1].pinned if moments else ()
        bits = kept[t] if kept else 0
        held = {other for k, other in enumerate(before) if bits >> k & 1}
        moments.append(Moment(chunk, f"unit {t}", turn is not None and t >= turn, tuple(sorted(held | {chunk}))))
    return Trace("training_step", tuple(moments), updates)


@st.composite
def instances(draw: st.DrawFn, equal: bool = False) -> Instance:
    chunks = draw(st.integers(2, 5))
    order = draw(st.lists(st.integers(0, chunks - 1), min_size=2, max_size=12))
    held = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=len(order), max_size=len(order)))
    trace = trace_of(order, held)
    stale = draw(st.sampled_from([range(chunks), range(1), ()]))
    size = (1,) * chunks if equal else tuple(draw(st.integers(0, 6)) for _ in range(chunks))
    cost = (1,) * chunks if equal else tuple(draw(st.sampled_from([s, 2 * s, 5])) for s in size)
    most = st.integers(0, max(sum(size) // 2, 1))
    flat = draw(st.booleans())
    room = (draw(most),) * len(order) if flat else tuple(draw(most) for _ in order)
    return Instance(trace, find_gaps(trace, stale), room, size, cost)


def left(instance: Instance, kept: Sequence[bool]) -> list[int]:
    """The room that is left by moment."""
    free = list(instance.room)
    for gap, keep in zip(instance.gaps.free, kept, strict=True):
        for start, stop in gap.ranges(len(free)) if keep else ():
            for moment in range(start, stop):
                free[moment] -= instance.size[gap.chunk]
    return free


def loss(instance: Instance, kept: Sequence[bool]) -> int:
    gaps = zip(instance.gaps.free, kept, strict=True)
    return sum(instance.cost[gap.chunk] for gap, keep in gaps if not keep)


def optimum(instance: Instance) -> int:
    """The least loss, by trying every choice."""
    gaps = instance.gaps.free
    assume(len(gaps) <= _MOST_GAPS)
    choices = [kept for kept in product((True, False), repeat=len(gaps)) if min(left(instance, kept)) >= 0]
    return min(loss(instance, kept) for kept in choices)


# Which gaps are kept


@settings(max_examples=150, deadline=None, derandomize=True)
@given(instances(equal=True))
def test_equal_sizes_and_costs_are_optimal(instance: Instance) -> None:
    kept = choose_kept(*instance.arguments())
    assert min(left(instance, kept)) >= 0
    assert loss(instance, kept) == optimum(instance)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(instances())
def test_any_sizes_and_costs_are_within_four_times_the_optimum(instance: Instance) -> None:
    kept = choose_kept(*instance.arguments())
    best = optimum(instance)
    assert min(left(instance, kept)) >= 0
    assert best <= loss(instance, kept) <= 4 * best
    forced = sum(instance.cost[gap.chunk] for gap in instance.gaps.forced)
    assert lower_bound(*instance.arguments()) <= forced + best


@settings(max_examples=150, deadline=None, derandomize=True)
@given(instances(), st.booleans())
def test_nothing_that_is_dropped_could_stay(instance: Instance, thorough: bool) -> None:
    kept = choose_kept(*instance.arguments(), thorough=thorough)
    for index, keep in enumerate(kept):
        if not keep:
            more = [*kept[:index], True, *kept[index + 1 :]]
            assert min(left(instance, more)) < 0


@pytest.mark.parametrize("room", range(11))
def test_through_the_turn_what_is_needed_first_stays(room: int) -> None:
    chunks = 10
    trace = trace_of([*range(chunks), *reversed(range(chunks))], turn=chunks)
    gaps = find_gaps(trace, range(chunks))
    kept = choose_kept(gaps, (room,) * 20, (1,) * chunks, (1,) * chunks)
    stay = {gap.chunk for gap, keep in zip(gaps.free, kept, strict=True) if keep}
    # the last one is needed again at once, and each other one has those behind it in its gap
    assert stay == set(range(max(chunks - 1 - room, 0), chunks))
    bound = lower_bound(gaps, (room,) * 20, (1,) * chunks, (1,) * chunks)
    assert bound == chunks + chunks - len(stay), "the bound is exact here"


def test_the_bound_adds_up_cuts_that_share_no_gap() -> None:
    gaps = find_gaps(trace_of([0, 1, 2, 1, 0, 1, 2, 1, 0]), range(3))
    assert lower_bound(gaps, (0,) * 9, (1,) * 3, (1,) * 3) == 9, "without room each use needs an unshard"
    # with room for one: chunk 1 stays through moment 2, and 0 or 2 through 4 to 6 with 1 in use
    assert lower_bound(gaps, (1,) * 9, (1,) * 3, (1,) * 3) < 9


def test_one_large_and_worthless_chunk_makes_room_for_many() -> None:
    # chunk 0 is needed soonest, but takes the room of all the others and costs nothing
    trace = trace_of([1, 2, 3, 0, 4, 0, 1, 2, 3])
    gaps = find_gaps(trace, range(5))
    size, cost = (3, 1, 1, 1, 1), (1, 5, 5, 5, 5)
    kept = choose_kept(gaps, (3,) * 9, size, cost)
    assert [gap.chunk for gap, keep in zip(gaps.free, kept, strict=True) if not keep] == [0]


def test_a_small_chunk_does_not_keep_a_large_one_out() -> None:
    # chunk 0 is needed sooner and worth more per byte, but where both do not fit chunk 1 is five times the loss
    gaps = find_gaps(trace_of([1, 0, 2, 0, 1]), range(3))
    kept = choose_kept(gaps, (10,) * 5, (1, 10, 1), (2, 10, 1))
    assert [gap.chunk for gap, keep in zip(gaps.free, kept, strict=True) if not keep] == [0]


def test_frozen_chunks_stay_over_the_end_of_the_step_and_stale_ones_do_not() -> None:
    trace = trace_of([0, 1, 2])
    gaps = find_gaps(trace, stale=[1])
    assert gaps.free == (Gap(0, 0, 0), Gap(2, 2, 2))
    assert gaps.forced == (Gap(1, 1, 1),)
    assert find_gaps(trace, resident=[0, 1]).free == (Gap(2, 2, 2),)
    assert choose_kept(gaps, (2, 2, 2), (1, 1, 1), (1, 1, 1)) == (True, True)


def test_a_gap_without_a_moment_needs_no_room() -> None:
    trace = trace_of([0, 0, 1, 1])
    gaps = find_gaps(trace, stale=[0, 1])
    assert choose_kept(gaps, (0,) * 4, (1, 1), (1, 1)) == (True, True)
    assert lower_bound(gaps, (0,) * 4, (1, 1), (1, 1)) == 2


def test_no_moments() -> None:
    gaps = find_gaps(Trace("test_step", (), False))
    assert choose_kept(gaps, (), (1,), (1,)) == ()
    assert lower_bound(gaps, (), (1,), (1,)) == 0


def test_negative_room_is_refused() -> None:
    with pytest.raises(ValueError, match="-3 bytes in moment 1"):
        choose_kept(find_gaps(trace_of([0, 1])), (1, -3), (1, 1), (1, 1))


@pytest.mark.parametrize(("chunks", "moments", "seconds"), [(64, 1500, 1.0), (500, 5000, 10.0)])
def test_real_sizes_take_no_time(chunks: int, moments: int, seconds: float) -> None:
    order = [t * chunks // (moments // 2) for t in range(moments // 2)]
    trace = trace_of([*order, *reversed(order)])
    size = [100 + 7 * chunk % 31 for chunk in range(chunks)]
    gaps = find_gaps(trace, range(chunks))
    room = [sum(size) // 3] * moments
    start = time.process_time()
    kept = choose_kept(gaps, room, size, size)
    assert time.process_time() - start < seconds, "some ten times what it takes on an idle machine"
    dropped = sum(size[gap.chunk] for gap, keep in zip(gaps.free, kept, strict=True) if not keep)
    assert sum(size) + dropped <= 1.01 * lower_bound(gaps, room, size, size)


# When copies start


@settings(max_examples=200, deadline=None, derandomize=True)
@given(instances(), st.sampled_from([None, 0, 1, 2, 3]))
def test_copies_start_in_the_order_of_need_where_there_is_room(instance: Instance, depth: int | None) -> None:
    gaps = instance.gaps
    kept = choose_kept(*instance.arguments())
    free = left(instance, kept)
    dropped = [gap for gap, keep in zip(gaps.free, kept, strict=True) if not keep]
    unshards = sorted([*dropped, *gaps.forced], key=lambda gap: gap.need)
    starts = prefetch_starts(unshards, free, instance.size, depth)
    begins = [gap.need if start is None else start for gap, start in zip(unshards, starts, strict=True)]
    assert all(first <= second for first, second in pairwise(begins))
    for index, (gap, begin) in enumerate(zip(unshards, begins, strict=True)):
        assert begin <= gap.need
        assert gap.wraps or begin > gap.last
        for moment in range(max(begin, 0), gap.need):
            free[moment] -= instance.size[gap.chunk]
        if depth is not None:
            # started behind the acquire of moment `begin`, so that moment's own need is over
            assert sum(other.need > begin for other in [*unshards[:index], gap] if begin < gap.need) <= depth
    assert min(free) >= 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(instances())
def test_no_copy_could_start_a_moment_earlier(instance: Instance) -> None:
    gaps = [*instance.gaps.free, *instance.gaps.forced]
    unshards = sorted((gap for gap in gaps if gap.ranges(len(instance.room))), key=lambda gap: gap.need)
    starts = prefetch_starts(unshards, instance.room, instance.size)
    free, last = list(instance.room), -1
    for gap, start in zip(unshards, starts, strict=True):
        size, begin = instance.size[gap.chunk], gap.need if start is None else start
        assert gap.wraps or begin > gap.last
        for moment in range(max(begin, 0), gap.need):
            free[moment] -= size
        earlier = begin - 1
        bounded = earlier < last or earlier < (-1 if gap.wraps else gap.last + 1)
        assert bounded or (earlier >= 0 and free[earlier] < size), "what has room in moment 0 starts before it"
        last = begin


def test_the_first_chunks_start_before_the_step() -> None:
    unshards = find_gaps(trace_of([0, 1, 2, 3]), range(4)).forced
    assert prefetch_starts(unshards, (1, 1, 1, 1), (1,) * 4) == (-1, -1, 1, 2)
    assert prefetch_starts(unshards, (9, 9, 9, 9), (1,) * 4) == (-1, -1, -1, -1)
    assert prefetch_starts(unshards, (9, 9, 9, 9), (1,) * 4, depth=2) == (-1, -1, 0, 1)
    assert prefetch_starts(unshards, (0, 0, 0, 0), (1,) * 4) == (-1, None, None, None)
    assert prefetch_starts(unshards, (9, 9, 9, 9), (1,) * 4, depth=0) == (None,) * 4


# Traces


def test_uses_are_the_stretches_in_which_a_chunk_is_pinned() -> None:
    trace = trace_of([0, 1, 0, 0, 2], [0, 1, 0, 0, 1])
    assert [moment.pinned for moment in trace.moments] == [(0,), (0, 1), (0,), (0,), (0, 2)]
    assert trace.uses == {0: ((0, 1), (2, 2), (3, 4)), 1: ((1, 1),), 2: ((4, 4),)}
    assert trace.order == (0, 1, 0, 0, 2)


def test_merging_takes_the_most_of_each_rank() -> None:
    first = Trace("s", (Moment(0, "a", False, (0,), 5), Moment(1, "b", False, (1,), 7)), True)
    second = Trace("s", (Moment(0, "a", False, (0,), 6), Moment(1, "b", False, (0, 1), 2)), True)
    merged = merge([first, second])
    assert merged.moments == (Moment(0, "a", False, (0,), 6), Moment(1, "b", False, (0, 1), 7))
    assert merged.same_order(first)
    assert merge([first]) == first


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Trace("s", (Moment(0, "a", False, (0,)), Moment(2, "c", False, (2,))), True), r"chunk 1 \(b\).*chunk 2 \(c\)"),
        (Trace("s", (Moment(0, "a", False, (0,)),), True), "2 moments on rank 0 and 1 on rank 1"),
        (Trace("s", (Moment(0, "a", False, (0,)), Moment(1, "b", False, (1,))), False), "updates=False"),
    ],
)
def test_different_steps_do_not_merge(other: Trace, message: str) -> None:
    first = Trace("s", (Moment(0, "a", False, (0,)), Moment(1, "b", False, (1,))), True)
    with pytest.raises(ValueError, match=message):
        merge([first, other])
    with pytest.raises(ValueError, match="got none"):
        merge([])


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (Moment(1, "b", False, (0,)), "moment 1 begins with chunk 1"),
        (Moment(1, "b", False, (1, 0)), "ascending"),
        (Moment(1, "b", False, (1, 1)), "ascending"),
        (Moment(1, "b", False, (1, 2)), "pins chunk 2, which is not in use before"),
    ],
)
def test_a_trace_that_cannot_be(moment: Moment, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trace("s", (Moment(0, "a", False, (0,)), moment), True)
