"""Bytes that a contender holds: what can be seen, and what the layout and the engine's tiers say."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contender import Contender, Entry, prepare
from benchmarks.workload import Workload
from lightning_gemini.core import Engine, Home

_WARM_STEPS = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes per parameter of the whole model on one rank.

    Attributes:
        loaded: after a backward, with the gradients that wait for the step.
        rest: after a step and ``zero_grad``.
        peak: the most in a step, activations included.
        layout: ``loaded`` as the layout alone says it: shards of parameters, gradients, masters, optimizer states.
        counted: ``loaded`` as the engine's tiers count it; the layout's bytes and the buffers that are kept.
    """

    loaded: float
    rest: float
    peak: float
    layout: float | None = None
    counted: float | None = None


@dataclass(frozen=True)
class _Recorded:
    """Bytes more than when the recorder started: at rest, the most from there on, and loaded."""

    rest: int
    peak: int
    loaded: int


def measure_footprint(entry: Entry, workload: Workload) -> tuple[Footprint, Contender]:
    """Builds a contender and trains it for a few steps.

    NOTE: two ways to look. Python's tensors are exact but for what C++ alone holds, which is DDP's buckets. The
    profiler's record of allocations has these, and the peak inside a step, but not what other threads free, as happens
    to FSDP2's buffers. So DDP is read from the record, the others from their tensors, and the peak is what the record
    says a step adds.
    """
    before = live_bytes()
    contender = prepare(entry, workload)
    built = live_bytes() - before
    with recorded() as recorder:
        for _ in range(_WARM_STEPS):
            contender.train()
        rest = live_bytes() - before
        with record_function("rest"):
            pass
        contender.train()
        contender.backward()
        loaded = live_bytes() - before
        with record_function("loaded"):
            pass
    found = _read(recorder)
    if entry.way == "ddp":
        rest, loaded = built + found.rest, built + found.loaded
    numel = sum(param.numel() for param in contender.model.parameters())
    peak = (rest + found.peak - found.rest) / numel
    engine = contender.engine
    if engine is None:
        footprint = Footprint(loaded / numel, rest / numel, peak)
    else:
        counted = engine.store.device.used + engine.store.host.used
        footprint = Footprint(loaded / numel, rest / numel, peak, layout_bytes(engine) / numel, counted / numel)
    contender.optimizer.step()
    contender.optimizer.zero_grad()
    return footprint, contender


def live_bytes() -> int:
    """Bytes of all storages that Python's tensors and their gradients hold."""
    gc.collect()
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor):  # isinstance would wake the lazy attributes of modules
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            # a wrapper, such as a DTensor, has no memory of its own
            with suppress(RuntimeError, NotImplementedError):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    sizes.pop(0, None)
    return sum(sizes.values())


def layout_bytes(engine: Engine) -> int:
    """What the layout promises between a backward and its step, with Adam's two fp32 states."""
    total = 0
    for chunk in engine.layout.chunks:
        numel = engine.layout.shard_numel(chunk.index)
        total += (
            chunk.nbytes if engine.store.chunks[chunk.index].home is Home.FULL else numel * chunk.kind.dtype.itemsize
        )
        if chunk.kind.updated:
            total += numel * (chunk.kind.dtype.itemsize + 8)
        if chunk.index in engine.store.masters:
            total += engine.store.masters[chunk.index].part.nbytes
    return total


def most_extra(recorder: profile) -> int:
    """The most bytes that were given out at a time, beyond those of the beginning or of the end, whichever are more."""
    now = peak = 0
    for _, nbytes in _events(recorder):
        now += nbytes
        peak = max(peak, now)
    return peak - max(now, 0)


def _events(recorder: profile) -> Iterator[tuple[str, int]]:
    assert recorder.profiler is not None
    assert recorder.profiler.kineto_results is not None
    for event in sorted(recorder.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        name = event.name()
        yield name, event.nbytes() if name == "[memory]" else 0


def _read(recorder: profile) -> _Recorded:
    now, rest, peak, loaded = 0, None, 0, 0
    for name, nbytes in _events(recorder):
        now += nbytes
        if name == "rest":
            rest = now
        elif name == "loaded":
            loaded = now
        if rest is not None and not loaded:
            peak = max(peak, now)
    assert rest is not None
    return _Recorded(rest, peak, loaded)


@contextmanager
def recorded() -> Iterator[profile]:
    """Records what the allocator does. The profiler announces itself on stderr: not here."""
    with open(os.devnull, "w") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            recorder.start()
            yield recorder
            recorder.stop()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
