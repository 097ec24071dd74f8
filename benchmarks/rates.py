"""Measures what a machine can do: its copies, its matrix products, its host memory and the update on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.optim import AdamW

from benchmarks.estimate import median
from benchmarks.floor import Rates
from lightning_gemini.optim.adam import Adam
from lightning_gemini.optim.kernel import kernel_for
from lightning_gemini.optim.operands import Operands


@dataclass(frozen=True)
class Extent:
    """How much is copied and computed to measure it.

    Attributes:
        copy: bytes of one copy.
        matmul: rows and columns of the matrices.
        update: parameters of one update on the host.
        repeats: samples, of which the median counts; one more warms up.
    """

    copy: int = 2**30
    matmul: int = 8192
    update: int = 100_000_000
    repeats: int = 7


def measure_rates(device: torch.device, extent: Extent) -> Rates:
    """The rates of this process's machine, with as many host threads as torch has here; see :class:`Rates`.

    Where ``device`` is the CPU, all copies are within host memory.
    """

    def rate(action: Callable[[], object], amount: float) -> float:
        return amount / _seconds(action, device, extent.repeats)

    nbytes = extent.copy
    copies = _Copies(device, nbytes)
    measured = {
        "h2d": rate(copies.to_device, nbytes),
        "d2h": rate(copies.to_host, nbytes),
        "duplex": rate(copies.both, 2 * nbytes),
        "device_copy": rate(copies.on_device, 2 * nbytes),
    }
    del copies
    return Rates(
        **measured,
        matmul=rate(_matmul(extent.matmul, device), 2.0 * extent.matmul**3),
        host_copy=rate(_Copies(torch.device("cpu"), nbytes).on_device, 2 * nbytes),
        host_update=rate(_update(extent.update), extent.update),
        threads=torch.get_num_threads(),
    )


class _Copies:
    """Two buffers of ``nbytes`` in host memory, pinned for a GPU, and two on the device."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        cuda = device.type == "cuda"
        self._host = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        self._there = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._lanes = [torch.cuda.Stream(device) if cuda else None for _ in range(2)]

    def to_device(self) -> None:
        self._there[0].copy_(self._host[0], non_blocking=True)

    def to_host(self) -> None:
        self._host[1].copy_(self._there[1], non_blocking=True)

    def both(self) -> None:
        for lane, copy in zip(self._lanes, (self.to_device, self.to_host), strict=True):
            with nullcontext() if lane is None else torch.cuda.stream(lane):
                copy()

    def on_device(self) -> None:
        self._there[0].copy_(self._there[1])


def _matmul(size: int, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.matmul(left, right, out=out)


def _update(numel: int) -> Callable[[], object]:
    """One step of the kernel that the engine updates shards in host memory with."""
    kernel, rule, state = kernel_for(torch.device("cpu")), Adam(), {}
    group = AdamW([torch.zeros(1)], lr=1e-4).param_groups[0]
    shard, grad = (torch.full((numel,), 0.01, dtype=torch.bfloat16) for _ in range(2))
    master = torch.zeros(numel, dtype=torch.int16)

    def step() -> None:
        scalars = rule.scalars(group, state)
        states = rule.states(state, shard, torch.float32)
        kernel.update(rule, scalars, Operands(shard, grad, master, states))

    return step


def _seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median over ``repeats`` calls, each from an idle device to an idle device."""
    samples = []
    for _ in range(repeats + 1):
        _settle(device)
        start = time.perf_counter()
        action()
        _settle(device)
        samples.append(time.perf_counter() - start)
    return median(samples[1:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
