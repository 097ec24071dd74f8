"""What an engine holds where, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from lightning_gemini.core.chunk import Home
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.chunk_update import ChunkUpdate
from lightning_gemini.core.memory import Tier, format_bytes
from lightning_gemini.core.playbook import Known
from lightning_gemini.core.speeds import Speeds
from lightning_gemini.core.store import Store
from lightning_gemini.core.worker import hidden_share


def memory_report(store: Store, known: Sequence[Known], updates: Iterable[ChunkUpdate], waiting: bool) -> str:
    """This rank's chunks and bytes per tier, now and at the peak, what each kind of step moves, and what was moved.

    Args:
        known: the steps that there are plans for.
        updates: of all chunks that an optimizer updates.
        waiting: whether gradients wait for the step.
    """
    where = {
        Home.FULL: "kept whole on the device",
        Home.DEVICE: "with their shards on the device",
        Home.HOST: "with their shards in host memory",
    }
    lines = []
    for home, text in where.items():
        if alike := [chunk for chunk in store.chunks if chunk.home is home]:
            lines.append(f"{len(alike)} chunks {text}, {format_bytes(sum(c.own.nbytes for c in alike))} of parameters")
    lines += [_tier_line(tier) for tier in (store.device, store.host) if tier.peak]
    if (line := _update_line(store, [u for u in updates if not u.is_new], waiting)) is not None:
        lines.append(line)
    lines += [line for one in known if (line := _step_line(one)) is not None]
    lines += [_speeds_line(expected.speeds) for one in known if (expected := one.forecast) is not None][:1]
    counters = store.counters
    if counters.unshards:
        lines.append(
            f"{counters.followed} steps by plan, {counters.strayed} that went otherwise; {counters.unshards} unshards, "
            f"{counters.prefetched} of them ahead of their need; {counters.reshards} chunks freed; "
            f"{store.waits.seconds():.3g} s waited for chunks"
        )
    if counters.fetched_bytes or counters.offloaded_bytes or counters.rehomed_bytes:
        lines.append(
            f"{format_bytes(counters.fetched_bytes)} fetched from the host, {format_bytes(counters.offloaded_bytes)} "
            f"offloaded to it, {format_bytes(counters.rehomed_bytes)} moved to other homes"
        )
    host_updates = store.host_updates
    if host_updates.count:
        lines.append(
            f"{host_updates.count} chunks updated in the background by {host_updates.threads}: "
            f"{host_updates.busy_seconds:.3g} s of work, {host_updates.waited_seconds:.3g} s waited for, "
            f"{hidden_share(host_updates.busy_seconds, host_updates.waited_seconds) or 0:.0%} hidden"
        )
    if store.layout.world_size > 1:
        lines.append(
            f"{format_bytes(counters.gathered_bytes)} gathered from other ranks, "
            f"{format_bytes(counters.reduced_bytes)} of gradients sent to them in {counters.reduces} reductions"
        )
    return "\n".join(lines)


def chunk_states(store: Store) -> str:
    """What every chunk is doing, a line each; waits for nothing, so any thread may ask."""
    return "\n".join(
        f"chunk {chunk.index}: {chunk.state.name}, home {chunk.home.name}, {chunk.pins} pins, from {chunk.names[0]} on"
        f"{', an update is under way' if chunk.index in store.host_updates.under_way else ''}"
        for chunk in list(store.chunks)
    )


def gradient_states(gradients: Sequence[ChunkGradient]) -> str:
    """What the gradient of every chunk is doing, a line each; waits for nothing, so any thread may ask."""
    return "\n".join(
        f"chunk {gradient.chunk.index}: {gradient.state.name}"
        f"{', some of it has come since the last step' if any(gradient.used) else ''}"
        f"{', reduced in this backward' if gradient.reduced else ''}"
        f"{', on its way to host memory' if gradient.landing is not None else ''}"
        for gradient in gradients
    )


def _step_line(known: Known) -> str | None:
    """What one kind of step moves by its plan, and the least that it could."""
    plan = known.plan
    if plan is None:
        return None
    moved = [f"fetches {format_bytes(plan.fetched)}"]
    if plan.gathered:
        moved.append(f"gathers {format_bytes(plan.gathered)}")
    both = f"{format_bytes(plan.fetched + plan.gathered)} together, " if plan.gathered else ""
    least = f" ({both}the least with these homes and this memory: {format_bytes(plan.least)})"
    offloads = f", offloads {format_bytes(plan.offloaded)}" if plan.offloaded else ""
    most = max((a + m.other for a, m in zip(plan.peak, known.trace.moments, strict=True)), default=0)
    return (
        f"{known.trace.kind}: {' and '.join(moved)}{least}{offloads}; {format_bytes(most)} of the device at the most"
        f"{_times(known)}"
    )


def _times(known: Known) -> str:
    """What a step was expected to take, and what it takes."""
    text, expected = "", known.forecast
    if expected is not None:
        text += f"; {expected.seconds:.3g} s predicted"
        if expected.host_update:
            text += f" with {expected.update_hidden_share:.0%} of the updates in host memory hidden"
    if known.measured is not None:
        text += f"; {known.measured:.3g} s measured"
    return text


def _speeds_line(speeds: Speeds) -> str:
    """What predictions are made of."""
    bytes_per_second = {"fetches": speeds.fetch, "offloads": speeds.offload, "gathers": speeds.gather}
    elements_per_second = {"in host memory": speeds.host_update, "on the device": speeds.device_update}
    copies = [f"{what} {format_bytes(rate)}/s" for what, rate in bytes_per_second.items() if rate and isfinite(rate)]
    updates = [f"{rate:.3g} parameters/s {where}" for where, rate in elements_per_second.items() if isfinite(rate)]
    return f"speeds: {', '.join([*copies, *(f'updates {update}' for update in updates)])}"


def _update_line(store: Store, updates: Sequence[ChunkUpdate], waiting: bool) -> str | None:
    """What each element takes that has been updated so far."""
    chunks = [update.chunk for update in updates]
    numel = sum(chunk.own.numel() for chunk in chunks)
    if not numel:
        return None
    masters = [store.masters[chunk.index].part.nbytes for chunk in chunks if chunk.index in store.masters]
    parts = {
        "parameter": sum(chunk.own.nbytes for chunk in chunks) / numel,
        "master": sum(masters) / numel,
        "optimizer state": sum(update.state_bytes for update in updates) / numel,
        "gradient that waits for the step": sum(chunk.own.nbytes for chunk in chunks) / numel if waiting else 0,
    }
    listed = ", ".join(f"{value:.3g} {name}" for name, value in parts.items() if value)
    return f"{sum(parts.values()):.3g} bytes per trained parameter: {listed}"


def _tier_line(tier: Tier) -> str:
    bound = f" of {format_bytes(tier.capacity)}" if tier.capacity is not None else ""
    return (
        f"{tier.name} memory of chunks: {format_bytes(tier.used)} in use, {format_bytes(tier.peak)} at the peak{bound}"
    )
