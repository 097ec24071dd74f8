"""Lanes, marks and the stopwatch: at once on the CPU; on CUDA, with fake streams, in the right order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lightning_gemini.core.streams import Stopwatch, lanes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# On a device without streams


def test_on_the_cpu_work_is_done_when_it_is_issued() -> None:
    fetch, offload = lanes(CPU)
    source, target = torch.arange(4.0), torch.zeros(4)
    with fetch.after_compute():
        target.copy_(source, non_blocking=True)
    for mark in (fetch.mark(), offload.mark()):
        assert mark.over()
        mark.join()
        mark.wait()
    assert torch.equal(target, source)


def test_on_the_cpu_the_stopwatch_adds_what_the_host_takes() -> None:
    watch, start = Stopwatch(CPU), time.perf_counter()
    for _ in range(2):
        with watch.measure():
            time.sleep(0.02)
    time.sleep(0.02)  # not inside
    assert 0.04 <= watch.seconds() <= time.perf_counter() - start - 0.02
    assert watch.seconds() == watch.seconds()


def test_what_raises_is_not_measured() -> None:
    watch = Stopwatch(CPU)
    with pytest.raises(KeyError), watch.measure():
        raise KeyError
    assert watch.seconds() == 0


# On CUDA, with streams that are played back


class FakeStream:
    """Keeps what it is given: ``("run", name)``, ``("record", event)`` and ``("wait", event)``."""

    def __init__(self, device: torch.device = CUDA) -> None:
        self.device = device
        self.given: list[tuple[str, object]] = []
        Fake.streams.append(self)

    def wait_stream(self, other: FakeStream) -> None:
        event = FakeEvent()
        event.record(other)
        self.wait_event(event)

    def wait_event(self, event: FakeEvent) -> None:
        self.given.append(("wait", event))


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.passed, self.at = enable_timing, False, 0.0
        Fake.events.append(self)

    def record(self, stream: FakeStream) -> None:
        stream.given.append(("record", self))

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        Fake.host_waits += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.timing
        assert end.timing
        assert self.passed
        assert end.passed
        return end.at - self.at  # milliseconds, as CUDA's


class Fake:
    """The fake device: its streams, and which of them is current."""

    streams: list[FakeStream] = []
    events: list[FakeEvent] = []
    host_waits = 0
    current: FakeStream

    @classmethod
    @contextmanager
    def stream(cls, stream: FakeStream) -> Iterator[None]:
        before, cls.current = cls.current, stream
        try:
            yield
        finally:
            cls.current = before

    @classmethod
    def run(cls, name: str) -> None:
        """Gives the current stream some work."""
        cls.current.given.append(("run", name))

    @classmethod
    def play(cls, order: list[FakeStream]) -> list[str]:
        """What runs, where the first stream of ``order`` that can go on always does."""
        places, done = dict.fromkeys(order, 0), []
        for event in cls.events:
            event.passed = False
        while True:
            for stream in order:
                kind, what = stream.given[places[stream]] if places[stream] < len(stream.given) else ("end", None)
                if kind != "end" and not (kind == "wait" and not what.passed):
                    break
            else:
                assert all(places[stream] == len(stream.given) for stream in order), "the streams wait for each other"
                return done
            places[stream] += 1
            if kind == "record":
                what.passed = True
            elif kind == "run":
                done.append(what)


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """Puts the fakes in torch's place; gives the compute stream."""
    Fake.streams, Fake.events, Fake.host_waits = [], [], 0
    Fake.current = FakeStream()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Fake.current)
    monkeypatch.setattr(torch.cuda, "stream", Fake.stream)
    return Fake.current


def test_a_fetch_comes_after_the_allocation_and_before_the_use(compute: FakeStream) -> None:
    fetch, offload = lanes(CUDA)
    Fake.run("allocate")
    with fetch.after_compute():
        Fake.run("fetch")
    mark = fetch.mark()
    Fake.run("other compute")
    with offload.after_compute():
        Fake.run("offload")
    mark.join()
    Fake.run("use")
    assert not Fake.host_waits
    own, other = Fake.streams[1:]
    # whichever stream is the fastest; compute does not wait for the copy before it has to
    assert Fake.play([compute, own, other]) == ["allocate", "other compute", "fetch", "use", "offload"]
    assert Fake.play([own, other, compute]) == ["allocate", "fetch", "other compute", "offload", "use"]
    assert Fake.play([other, compute, own]) == ["allocate", "other compute", "offload", "fetch", "use"]


def test_a_mark_is_of_what_was_issued_before_it(compute: FakeStream) -> None:
    fetch, _ = lanes(CUDA)
    with fetch.after_compute():
        Fake.run("first")
    mark = fetch.mark()
    with fetch.after_compute():
        Fake.run("second")
    mark.join()
    Fake.run("use")
    assert Fake.play([compute, *Fake.streams[1:]]) == ["first", "use", "second"]
    assert mark.over()


def test_a_lane_can_come_after_the_other_without_the_compute_stream(compute: FakeStream) -> None:
    fetch, offload = lanes(CUDA)
    with offload.after_compute():
        Fake.run("offload")
    mark = offload.mark()
    with fetch.after_compute():
        mark.join()
        Fake.run("fetch")
    Fake.run("compute")
    assert Fake.play([compute, *Fake.streams[1:]]) == ["compute", "offload", "fetch"]


def test_the_host_waits_only_where_it_is_asked_to(compute: FakeStream) -> None:
    fetch, _ = lanes(CUDA)
    mark = fetch.mark()
    assert not mark.over()
    mark.join()
    assert Fake.host_waits == 0
    mark.wait()
    assert Fake.host_waits == 1


def test_the_stream_is_current_again_after_an_error(compute: FakeStream) -> None:
    fetch, _ = lanes(CUDA)
    with pytest.raises(KeyError), fetch.after_compute():
        raise KeyError
    assert Fake.current is compute


def test_the_stopwatch_reads_events_when_they_have_passed(compute: FakeStream) -> None:
    fetch, _ = lanes(CUDA)
    watch = Stopwatch(CUDA)
    for _ in range(3):
        with watch.measure():
            fetch.mark().join()
    assert [kind for kind, _ in compute.given] == ["record", "wait", "record"] * 3
    timed = [event for event in Fake.events if event.timing]
    assert watch.seconds() == 0  # the device has not come so far
    for event, at in zip(timed[:4], (0.0, 5.0, 7.0, 7.5), strict=True):
        event.passed, event.at = True, at
    timed[4].passed = True
    assert watch.seconds() == pytest.approx(0.0055)
    assert watch.seconds() == pytest.approx(0.0055), "counted once"
    timed[5].passed, timed[5].at = True, 1.0
    assert watch.seconds() == pytest.approx(0.0065)
    assert not Fake.host_waits


def test_the_stopwatch_keeps_few_events_where_nobody_asks(compute: FakeStream) -> None:
    watch = Stopwatch(CUDA)
    for _ in range(100):
        with watch.measure():
            pass
        for event in Fake.events:
            event.passed = True
    assert len(watch._pending) == 1
