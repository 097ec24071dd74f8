"""Says what does not fit, or has run out, in numbers, and what would make it fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lightning_gemini.core.chunk import Home
from lightning_gemini.core.errors import OutOfBudgetError
from lightning_gemini.core.footprint import Footprint, Footprints
from lightning_gemini.core.memory import Shortage, Tier, format_bytes
from lightning_gemini.core.planner import DoesNotFitError
from lightning_gemini.core.store import Store
from lightning_gemini.core.trace import Trace

#: More ranks than so many times as many as there are help nobody.
_MOST_RANKS = 64

_HOMES = "homes of chunks, with masters, states and gradients"


@dataclass(frozen=True)
class Need:
    """What a model needs on one rank, in bytes.

    Attributes:
        footprints: how the chunks' bytes are computed.
        working_set: unsharded chunks and gradient buffers that have to be on the device at one time.
        unit: the unit that needs the most of them.
        host_holds: whether homes in host memory are allowed; else all are on the device.
    """

    footprints: Footprints
    working_set: int
    unit: str
    host_holds: bool

    def homes(self, footprints: Footprints | None = None) -> int:
        """Bytes of all chunks' homes, and of what is in host memory beside them."""
        footprints = footprints or self.footprints
        return sum(one.kept for one in footprints.all()) + self.aside(footprints)

    def aside(self, footprints: Footprints) -> int:
        """Bytes in host memory beside homes."""
        return footprints.aside if self.host_holds else footprints.frozen_masters


def model_does_not_fit(need: Need, device: Tier, host: Tier, hosted: int) -> OutOfBudgetError:
    """The error for a model whose chunks do not fit, before its first step.

    Args:
        hosted: bytes that are left for host memory, when the device has taken what it has room for: of homes, and of
            what is beside them.
    """
    total, ranks = need.homes(), need.footprints.layout.world_size
    on_device = need.working_set + (0 if need.host_holds else total - hosted)
    parts, aside = _parts(need.footprints.all()), need.aside(need.footprints)
    in_use = f"chunks and gradient buffers in use at one time, the most for {need.unit}"
    beside = {
        "masters of frozen parameters": need.footprints.frozen_masters,
        "gradients in use": aside - need.footprints.frozen_masters,
    }
    rest = ", ".join(f"{what} {format_bytes(nbytes)}" for what, nbytes in beside.items() if nbytes)
    rows = [("", "needed", "available", "")]
    if need.host_holds:
        kinds = f"{parts}, {rest}" if aside else parts
        near = f", of which {format_bytes(total - hosted)} can be on the device" if hosted < total else ""
        rows.append(("device memory", format_bytes(on_device), _bound(device.capacity), in_use))
        rows.append(("host memory", format_bytes(hosted), _bound(host.capacity), kinds + near))
    else:
        used = f"{parts}; {format_bytes(need.working_set)} for {in_use}"
        rows.append(("device memory", format_bytes(on_device), _bound(device.capacity), used))
        if aside:
            rows.append(("host memory", format_bytes(hosted), _bound(host.capacity), rest))
    remedies = _device_remedies(on_device, need.host_holds) if _lacks(device, on_device) else []
    lacking = 0
    if _lacks(device, on_device) and not need.host_holds:
        lacking = on_device - (device.capacity or 0)
        remedies.append("placement='auto' or 'host', which keep in host memory what has no room")
    if _lacks(host, hosted):
        remedies.append(f"{format_bytes(hosted - (host.capacity or 0))} more host memory (host_memory=...)")
        lacking = max(lacking, hosted - (host.capacity or 0))
    if lacking > 0:
        remedies += _remedies(need, total, total - lacking, ranks)
    return OutOfBudgetError(
        f"this model does not fit the memory of each of {ranks} rank(s):\n\n{_table(rows)}\n\nWhat would make it fit:\n"
        + "\n".join(f"- {remedy}" for remedy in remedies)
    )


def activations_do_not_fit(
    error: DoesNotFitError, traces: Sequence[Trace], store: Store, aside: int
) -> OutOfBudgetError:
    """The error for a recorded step that takes more than there is, before its update.

    Args:
        aside: bytes of host memory that no plan is asked about.
    """
    if error.trace is None or error.moment is None:
        return OutOfBudgetError(
            f"{format_bytes(error.needed + aside)} of host memory are needed on each rank for what the device has no "
            f"room for, but {format_bytes(error.available + aside)} may be used. The weights are unchanged. Use a "
            "larger host_memory or device_memory, more ranks, or a smaller batch, which leaves more of the device to "
            "chunks."
        )
    moment = traces[error.trace].moments[error.moment]
    chunks = sum(store.chunks[index].spec.nbytes for index in moment.pinned)
    rows = [
        ("device memory", ""),
        ("chunks in use", format_bytes(chunks)),
        ("activations, gradient buffers and others", format_bytes(moment.other)),
        ("needed", format_bytes(error.needed)),
        ("available", format_bytes(error.available)),
    ]
    return OutOfBudgetError(
        f"the recorded {traces[error.trace].kind} does not fit, even with all chunks in host memory that nobody is "
        f"using. The most is needed in {moment.reason} (moment {error.moment} of {len(traces[error.trace].moments)}); "
        f"the weights are unchanged.\n\n{_table(rows)}\n\nWhat would make it fit:\n"
        "- a smaller batch, or shorter sequences\n"
        "- gradient checkpointing\n"
        "- a larger device_memory, or a smaller margin, where the device has more\n"
        "- a smaller chunk_size, or smaller unit_modules, if chunks are most of it"
    )


def device_is_full(store: Store, movable: bool, nbytes: int, what: str) -> str:
    """Why ``what`` cannot have ``nbytes`` of the device in the middle of a step, in words.

    Args:
        movable: whether homes move to host memory where there is no room.
    """
    device, held = store.device, _on_device(store)
    rows = [
        ("device memory", ""),
        *((name, format_bytes(taken)) for name, taken in held.items()),
        ("asked for", format_bytes(nbytes)),
        ("needed", format_bytes(device.used + nbytes)),
        ("available", _bound(device.capacity)),
    ]
    remedies = [
        f"a device_memory of {format_bytes(device.used + nbytes)} or more, where the device has it",
        "more ranks",
        "a smaller chunk_size, or smaller unit_modules",
    ]
    if held[_HOMES] and not movable:
        remedies.insert(1, "placement='auto', which keeps in host memory what has no room")
    return (
        f"{what} needs {format_bytes(nbytes)} of device memory, for which there is no room:\n\n{_table(rows)}\n\n"
        "What would make it fit:\n" + "\n".join(f"- {remedy}" for remedy in remedies)
    )


def device_cannot_shrink(needed: int, capacity: int) -> OutOfBudgetError:
    """The error for a smaller device whose ``capacity`` is less than what stays on it between two steps."""
    return OutOfBudgetError(
        f"{format_bytes(needed)} of device memory are taken by chunks that no plan moves, so the device cannot have "
        f"{format_bytes(capacity)} from now on; the old size stays. Give at least that much, or make a new engine with "
        "the smaller size."
    )


def memory_ran_out(error: Exception, store: Store, where: str, outcome: str, probe: int) -> str:
    """What ran out, where, what is on the device, and what would help, in words.

    Args:
        error: what was raised.
        where: a unit or a step, in words.
        outcome: what becomes of the step, in a sentence.
        probe: bytes that the device's allocator has given out at the most; 0 if nobody counts them.
    """
    device, collectives = store.device, store.collectives
    rows = [(name, format_bytes(taken)) for name, taken in _on_device(store).items()]
    if probe:
        rows.append(("activations and others, at the most", format_bytes(max(probe - device.used, 0))))
    if device.capacity is not None:
        rows.append(("what chunks, gradients and activations may use", format_bytes(device.capacity)))
    rank = f"on rank {collectives.rank} " if collectives.world_size > 1 else ""
    first = str(error).strip().partition("\n")[0]
    return (
        f"memory ran out {rank}in {where}: {first}\n{outcome}\n\nOn the device, when it happened:\n{_table(rows)}\n\n"
        "What helps:\n"
        "- a smaller batch, or shorter sequences\n"
        "- activation checkpointing (torch.utils.checkpoint, gradient_checkpointing_enable())\n"
        "- a larger margin or a smaller device_memory, which leave more to activations\n"
        "- placement='auto' or 'host', if chunks are most of it"
    )


def warn_of_shortage(shortages: Sequence[Shortage], device: Tier) -> None:
    """Says that memory ran out, and what that means from now on."""
    shortage = shortages[0]
    freed = list(dict.fromkeys(name for one in shortages for name in one.freed))
    names = ", ".join(freed[:3]) + (" and others" if len(freed) > 3 else "")
    bound = "as much as before" if device.capacity is None else format_bytes(device.capacity)
    warnings.warn(
        f"out of memory on the device for {shortage.what} ({format_bytes(shortage.nbytes)}): freed "
        f"{names or 'what the allocator kept'}, and the step went on. Chunks, gradients and activations may use "
        f"{bound} from now on. A smaller device_memory or a larger margin leaves more room from the start.",
        stacklevel=2,
    )


def _on_device(store: Store) -> dict[str, int]:
    """The bytes that are counted on the device, by what they are for."""
    device = store.device
    in_use = sum(chunk.spec.nbytes for chunk in store.chunks if chunk.pins and chunk.home is not Home.FULL)
    return {
        _HOMES: device.used - store.unsharded_bytes - device.work,
        "unsharded chunks in use": in_use,
        "unsharded chunks that are idle or under way": store.unsharded_bytes - in_use,
        "gradient buffers, and what an update makes for itself": device.work,
    }


def _remedies(need: Need, total: int, available: int, ranks: int) -> list[str]:
    found = []
    if available > 0 and total <= _MOST_RANKS * available:
        found.append(f"{math.ceil(ranks * total / available)} ranks instead of {ranks}, each with as much memory")
    if need.footprints.policy.master is None and need.footprints.in_fp32:
        found.append("precision='bf16-mixed' with split masters: 14 bytes for each parameter instead of 16 with AdamW")
    for what, footprints in _smaller(need.footprints):
        smaller = need.homes(footprints)
        if smaller < total:
            verdict = "enough" if smaller <= available else "not enough alone"
            found.append(f"{what}: {format_bytes(smaller)} instead of {format_bytes(total)}, {verdict}")
    return found


def _smaller(footprints: Footprints) -> list[tuple[str, Footprints]]:
    policy, update = footprints.policy, footprints.update
    found = []
    if policy.master == "fp32" and policy.compute == torch.bfloat16:
        found.append(
            ("split masters (master_weights='split')", replace(footprints, policy=replace(policy, master="split")))
        )
    if policy.state == torch.float32 and footprints.ruled:
        found.append(
            ("bf16 states (state_dtype='bf16')", replace(footprints, policy=replace(policy, state=torch.bfloat16)))
        )
    if update.when == "at_step" and not update.skips:
        found.append(("update='in_backward'", replace(footprints, update=replace(update, when="in_backward"))))
    return found


def _device_remedies(needed: int, host_holds: bool) -> list[str]:
    remedies = [f"a device_memory of {format_bytes(needed)} or more, where the device has it"]
    if host_holds:  # so it is the working set alone
        remedies += ["a smaller chunk_size, if no one parameter is that large"]
        remedies += ["smaller units: fewer modules in unit_modules"]
    return remedies


def _lacks(tier: Tier, nbytes: int) -> bool:
    return tier.capacity is not None and nbytes > tier.capacity


def _bound(capacity: int | None) -> str:
    return "no bound" if capacity is None else format_bytes(capacity)


def _parts(footprints: Sequence[Footprint]) -> str:
    """What homes consist of."""
    parts = {
        "parameters": sum(one.parameter for one in footprints),
        "masters": sum(one.master for one in footprints),
        "optimizer states": sum(one.state for one in footprints),
        "gradients": sum(one.gradient for one in footprints),
    }
    return ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items() if nbytes)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
