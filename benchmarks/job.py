"""What one contender on a GPU is asked to train, and with how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.shapes import Shape

Way = Literal["gemini", "fsdp2", "plain"]

#: Bytes per parameter that the others hold on one rank: fp32 parameters, gradients and two states.
_WHOLE = 16


@dataclass(frozen=True)
class Job:
    """One contender: a model, a batch and who trains it how.

    Attributes:
        name: what the tables call the contender.
        shape: the model.
        rows: sequences of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        way: who holds the model: the engine, FSDP2 with ``CPUOffloadPolicy``, or the device as it is.
        placement: the engine's.
        update: when the engine updates.
        bf16_states: whether the engine keeps optimizer states in bf16.
        overlap: whether the engine's update on the host goes on behind the next step.
        clipping: whether the norm of the gradients is clipped to 1.
        clip_pairs: how often a step with clipping is compared with one without.
        draw: whether one of its steps is wanted as a timeline.
    """

    name: str
    shape: Shape
    rows: int
    accumulation: int = 1
    way: Way = "gemini"
    placement: Literal["auto", "host", "device"] = "auto"
    update: Literal["at_step", "in_backward"] = "at_step"
    bf16_states: bool = False
    overlap: bool = True
    clipping: bool = True
    clip_pairs: int = 0
    draw: bool = False

    @property
    def group(self) -> str:
        """The workload, the same text for all contenders that are compared."""
        return f"{self.shape.name} {self.rows}x{self.accumulation}"

    @property
    def label(self) -> str:
        """Workload and contender."""
        return f"{self.group} {self.name}"

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.rows * self.accumulation * self.shape.length


@dataclass(frozen=True)
class Machine:
    """Where jobs run, and how long.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``, which is then emulated with ``device_memory``.
        device_memory, host_memory: bytes that the engine may use; ``None`` for what the machine has, but for a margin.
        device_total, host_total: bytes that there are, for what cannot fit and need not be tried.
        threads: that the host computes with.
        warmup: steps that are not timed: the first is recorded, the second moves homes.
        steps: timed steps of a round.
    """

    device: str
    device_memory: int | None
    host_memory: int | None
    device_total: int | None
    host_total: int | None
    threads: int
    warmup: int = 3
    steps: int = 4


def does_not_fit(job: Job, machine: Machine) -> str | None:
    """Why a contender that is not the engine need not be tried; the engine says so itself."""
    where = {"fsdp2": ("host", machine.host_total), "plain": ("device", machine.device_total)}
    name, total = where.get(job.way, ("", None))
    needed = _WHOLE * job.shape.parameters
    if total is None or needed <= total:
        return None
    return (
        f"not tried: {_WHOLE} bytes per parameter are {needed / 2**30:.0f} GiB, the {name} has {total / 2**30:.0f} GiB"
    )


def jobs(shapes: dict[str, Shape], only: Sequence[str], tiny: bool) -> list[Job]:
    """All contenders of the models named in ``only``, the most valuable first; ``tiny`` has fewer sizes of batches."""
    small, middle, large = (shapes[name] for name in ("opt-1.3b", "opt-6.7b", "opt-13b"))
    wanted = {shapes[name] for name in only if name in shapes}
    found: list[Job] = []
    found += _compared(middle, 2 if tiny else 8, 1, clip_pairs=3, draw=True)
    found += [*_compared(small, 2 if tiny else 8, 1, clip_pairs=3), Job("plain", small, 2 if tiny else 8, way="plain")]
    found.append(Job("auto, no overlap", middle, 2 if tiny else 8, overlap=False))
    found += _compared(large, 1 if tiny else 4, 1, clip_pairs=3)
    found.append(Job("host", middle, 2 if tiny else 8, placement="host"))
    found += _compared(middle, 1 if tiny else 4, 4)
    found.append(Job("device", small, 2 if tiny else 8, placement="device"))
    if not tiny:
        found += _compared(middle, 16, 1)
        found.append(Job("host", small, 8, placement="host"))
        found.append(Job("host", large, 4, placement="host"))
        found += [*_compared(small, 2, 1), Job("plain", small, 2, way="plain")]
        found += [*_compared(small, 4, 4), Job("plain", small, 4, 4, way="plain")]
        found += _compared(middle, 2, 1)
        found += _compared(large, 4, 4)
        found += [Job("plain", middle, 8, way="plain"), Job("plain", large, 4, way="plain")]
        found += [Job("device", shape, 8, placement="device") for shape in (middle, large)]
    return [job for job in found if job.shape in wanted]


def _compared(shape: Shape, rows: int, accumulation: int, **of_auto: int) -> list[Job]:
    auto = replace(Job("auto", shape, rows, accumulation), **of_auto)
    return [auto, Job("FSDP2 offload", shape, rows, accumulation, way="fsdp2")]
