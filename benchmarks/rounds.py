"""Interleaved timing: every round times every contender once, in an order that is drawn anew."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from benchmarks.contender import Contender


@dataclass(frozen=True)
class Timing:
    """How samples are taken.

    Attributes:
        rounds: samples of each contender, which are pairs with the other contenders' samples of the same rounds.
        repeats: calls that one sample is the mean of.
        warmup: calls before the first round.
        warm: calls, untimed, right before each sample, so that it does not pay for the caches of the one before it.
    """

    rounds: int
    repeats: int = 1
    warmup: int = 2
    warm: int = 0


@dataclass(frozen=True)
class Series:
    """What one contender did: seconds per call, the slowest rank's, one a round; and its last loss."""

    name: str
    seconds: tuple[float, ...]
    loss: float


def time_rounds(
    contenders: Sequence[Contender],
    work: Callable[[Contender], float],
    timing: Timing,
    seed: int = 0,
    before: Callable[[Contender], object] = lambda _: None,
) -> list[Series]:
    """Times ``work`` on all contenders; every rank has to call.

    The garbage collector stays on, because it is part of what a contender costs, but starts each sample afresh.

    Args:
        before: called, untimed, before each sample and each call of the warm-up.
    """
    losses = dict.fromkeys((c.entry.name for c in contenders), 0.0)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for contender in contenders:
        for _ in range(timing.warmup):
            before(contender)
            work(contender)
    gc.collect()
    gc.freeze()
    shuffle = random.Random(seed).shuffle  # the same on all ranks
    order = list(contenders)
    for _ in range(timing.rounds):
        shuffle(order)
        for contender in order:
            name = contender.entry.name
            before(contender)
            for _ in range(timing.warm):
                work(contender)
            gc.collect()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(timing.repeats):
                losses[name] = work(contender)
            seconds[name].append((time.perf_counter() - start) / timing.repeats)
    gc.unfreeze()
    every: list[dict[str, list[float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, seconds)
    return [
        Series(name, tuple(max(ranks) for ranks in zip(*(e[name] for e in every), strict=True)), losses[name])
        for name in seconds
    ]
