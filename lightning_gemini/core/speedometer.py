"""Measures how fast a rank copies, gathers and updates, in a few hundredths of a second.

Each thing is done with scratch memory of about a chunk's size, on the lanes and by the kernels that steps use. The
first time does not count, and of the others the best does: that is what the machine can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_gemini.core.cores import HostThreads
from lightning_gemini.core.errors import OutOfBudgetError
from lightning_gemini.core.footprint import Footprints
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.speeds import Speeds, slowest
from lightning_gemini.core.store import Store
from lightning_gemini.core.streams import Lane, best_seconds
from lightning_gemini.optim.adam import Adam
from lightning_gemini.optim.kernel import Kernel, kernel_for
from lightning_gemini.optim.operands import Operands
from lightning_gemini.optim.rule import Rule
from lightning_gemini.optim.tensor_kernel import TensorKernel

#: The least bytes that say anything, where chunks are not smaller.
_LEAST_BYTES = 2**10

#: All ranks gather as often.
_GATHERS = 4

_WHAT = "measuring how fast this machine is"


@dataclass(frozen=True)
class _Most:
    """Bytes that are copied or gathered, and elements that are updated, at a time at the most."""

    nbytes: int
    elements: int


#: Beside a GPU more elements than a processor's cache holds; on an emulated device, where no plan depends on it, what
#: takes little time.
_BESIDE_GPU, _EMULATED = _Most(2**24, 2**24), _Most(2**22, 2**19)


def exchange(store: Store, footprints: Footprints, near: bool, said: Any) -> tuple[list[Any], Speeds | None]:
    """Measures, and tells the other ranks the result and ``said`` (picklable); all ranks call.

    Args:
        footprints: say what an update reads and writes.
        near: whether updates on the device matter; there a kernel may have to be compiled first.

    Returns:
        what every rank has said, and the speeds of the slowest; ``None`` if a rank has no room for a measurement.
    """
    speeds = _measure(store, footprints, near)
    if store.layout.world_size == 1:
        return [said], speeds
    with _scratch(store.device, min(max(chunk.nbytes for chunk in store.layout.chunks), _most(store).nbytes)) as buffer:
        every = store.collectives.gather_objects((said, speeds, buffer.numel()))
        found = [one for _, one, _ in every if one is not None]
        nbytes = min(numel for _, _, numel in every)
        if nbytes >= 4 * len(every) and len(found) == len(every):
            gathers = store.collectives.gather_objects(_gather_speed(store, buffer[:nbytes]))
            return [one for one, _, _ in every], replace(slowest(found), gather=min(gathers))
    return [one for one, _, _ in every], None


def _most(store: Store) -> _Most:
    return _EMULATED if store.device.device.type == "cpu" else _BESIDE_GPU


def _measure(store: Store, footprints: Footprints, near: bool) -> Speeds | None:
    """This rank's speeds, without that of gathers; ``None`` where there is no room."""
    with suppress(OutOfBudgetError, torch.OutOfMemoryError):
        fetch, offload = _copy_speeds(store)
        job = _job(footprints, _most(store).elements)
        host = math.inf
        if job is not None:
            in_background = job.kernel is None and store.host_updates.possible
            threads = store.host_updates.threads if in_background else None
            host = _with_threads(threads, partial(_update_speed, job, store.host))
        device = host
        if store.device.device.type != "cpu":
            device = _update_speed(job, store.device) if job is not None and near else math.inf
        return Speeds(fetch, offload, None, host, device)
    return None


def _copy_speeds(store: Store) -> tuple[float, float]:
    """Bytes per second to the device and to host memory, through pinned memory and on the lanes.

    Raises:
        OutOfBudgetError: there is no room to measure it.
    """
    wanted = min(max(chunk.nbytes for chunk in store.layout.chunks) // store.layout.world_size, _most(store).nbytes)
    with _scratch(store.device, wanted) as near:
        nbytes = near.numel()
        while nbytes and not store.host.room(nbytes):
            nbytes //= 2
        _require(nbytes, wanted, store.host)
        reserved, near = store.slabs.reserved_bytes, near[:nbytes]
        far = store.slabs.get(nbytes, torch.uint8, _WHAT)
        try:
            offload = _copy_speed(store.offloading, near, far)
            fetch = _copy_speed(store.fetching, far, near)
        finally:
            store.slabs.put(far)
            if store.slabs.reserved_bytes > reserved:
                store.slabs.trim()
    return fetch, offload


def _copy_speed(lane: Lane, source: Tensor, target: Tensor) -> float:
    device = source.device if source.is_cuda else target.device

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    with lane.after_compute():
        seconds = best_seconds(device, copy)
    lane.mark().join()
    return source.nbytes / seconds


def _gather_speed(store: Store, buffer: Tensor) -> float:
    """Bytes per second that arrive from other ranks; all of them call with as long a ``buffer``."""
    ranks = store.layout.world_size
    full = buffer[: buffer.numel() // (ranks * 4) * (ranks * 4)]
    seconds = best_seconds(full.device, lambda: store.collectives.gather(full).wait(), _GATHERS)
    return full.numel() * (ranks - 1) / ranks / seconds


@dataclass(frozen=True)
class _Job:
    """The update that most elements get; ``kernel`` is ``None`` for the one that runs rules on the tier."""

    rule: Rule
    settings: dict[str, Any]
    numel: int
    shard: torch.dtype
    master: torch.dtype | None
    state: torch.dtype
    kernel: Kernel | None


def _job(footprints: Footprints, most: int) -> _Job | None:
    """What is to be timed, with ``most`` elements at the most; ``None`` if nothing is updated.

    An optimizer that has no rule runs operation by operation, so it is taken to be as fast as Adam's rule run like
    that, in fp32.
    """
    chunks = [spec for spec in footprints.layout.chunks if footprints.trained(spec) and spec.kind.optimizer is not None]
    if not chunks:
        return None
    spec = max(chunks, key=lambda spec: spec.numel)
    numel, policy, dtype = spec.numel // footprints.layout.world_size, footprints.policy, spec.kind.dtype
    numel = min(numel, most)
    optimizer = footprints.widths.optimizers[spec.kind.optimizer or 0]
    group = optimizer.param_groups[spec.kind.group or 0]
    rule = footprints.widths.rule(spec, policy)
    if rule is None:
        defaults = torch.optim.Adam([torch.zeros(1)]).defaults
        return _Job(Adam(False), defaults, numel, torch.float32, None, torch.float32, TensorKernel(compiled=False))
    master = None
    if policy.needs_master(dtype):
        master = torch.int16 if policy.master == "split" else torch.float32
    return _Job(rule, group, numel, dtype, master, policy.state, None)


def _with_threads(threads: HostThreads | None, measure: Callable[[], float]) -> float:
    """What ``measure`` returns in a thread like the one that updates in the background; ``None``: in this one."""
    if threads is None:
        return measure()
    found: list[float] = []
    worker = threads.worker("gemini-measure")
    try:
        worker.submit(lambda: found.append(measure())).result()
    finally:
        worker.close(wait=True)
    return found[0]


def _update_speed(job: _Job, tier: Tier) -> float:
    """Elements per second.

    Raises:
        OutOfBudgetError: there is no room to measure it.
    """
    # shard and gradient are of one dtype
    dtypes = [job.shard, job.shard, *[job.master] * (job.master is not None), *[job.state] * len(job.rule.state_names)]
    width = sum(dtype.itemsize for dtype in dtypes if dtype is not None)
    numel = job.numel
    while numel and not tier.room(numel * width):
        numel //= 2
    _require(numel * width, job.numel * width, tier)
    tier.take(numel * width, _WHAT)
    try:
        with torch.inference_mode(False), torch.no_grad():
            shard, grad, *rest = (torch.ones(numel, dtype=d, device=tier.device) for d in dtypes if d is not None)
            master = rest.pop(0) if job.master is not None else None
            operands = Operands(shard, grad, master, rest)
            scalars = job.rule.scalars(job.settings, {})
            kernel = job.kernel or kernel_for(tier.device)
            seconds = best_seconds(tier.device, lambda: kernel.update(job.rule, scalars, operands))
    finally:
        tier.give(numel * width)
    return numel / seconds


@contextmanager
def _scratch(tier: Tier, nbytes: int) -> Iterator[Tensor]:
    """Bytes of a tier, as many as there is room for and at most ``nbytes``; maybe none."""
    while nbytes and not tier.room(nbytes):
        nbytes //= 2
    tier.take(nbytes, _WHAT)
    try:
        try:
            with torch.inference_mode(False):
                memory = torch.ones(nbytes, dtype=torch.uint8, device=tier.device)
        except torch.OutOfMemoryError:
            memory = torch.ones(0, dtype=torch.uint8, device=tier.device)
        yield memory
    finally:
        tier.give(nbytes)


def _require(nbytes: int, wanted: int, tier: Tier) -> None:
    if nbytes < min(wanted, _LEAST_BYTES):
        raise OutOfBudgetError(f"{tier.name} memory has no room for {_WHAT}")
