"""What an engine holds where, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_gemini.core.chunk import Home
from lightning_gemini.core.chunk_update import ChunkUpdate
from lightning_gemini.core.memory import Tier, format_bytes
from lightning_gemini.core.store import Store


def memory_report(store: Store, moving: bool, updates: Iterable[ChunkUpdate], waiting: bool) -> str:
    """This rank's bytes per tier, now and at the peak, and what has been moved.

    Args:
        moving: whether chunks are freed and unsharded again.
        updates: of all chunks that an optimizer updates.
        waiting: whether gradients wait for the step.
    """
    homes = {home: sum(chunk.home is home for chunk in store.chunks) for home in Home}
    where = {
        Home.FULL: "kept whole on the device",
        Home.DEVICE: "with their shards on the device",
        Home.HOST: "with their shards in host memory",
    }
    lines = [f"{count} chunks {where[home]}" for home, count in homes.items() if count]
    lines += [_tier_line(tier) for tier in (store.device, store.host) if tier.peak]
    if (line := _update_line(store, [u for u in updates if not u.is_new], waiting)) is not None:
        lines.append(line)
    counters = store.counters
    if moving:
        lines.append(
            f"{counters.unshards} unshards; {format_bytes(counters.fetched_bytes)} fetched from the host, "
            f"{format_bytes(counters.offloaded_bytes)} offloaded to it"
        )
    if store.layout.world_size > 1:
        lines.append(
            f"{format_bytes(counters.gathered_bytes)} gathered from other ranks, "
            f"{format_bytes(counters.reduced_bytes)} of gradients sent to them in {counters.reduces} reductions"
        )
    return "\n".join(lines)


def _update_line(store: Store, updates: Sequence[ChunkUpdate], waiting: bool) -> str | None:
    """What each element takes that has been updated so far."""
    chunks = [update.chunk for update in updates]
    numel = sum(chunk.shard.numel() for chunk in chunks)
    if not numel:
        return None
    masters = [store.masters[chunk.index].part.nbytes for chunk in chunks if chunk.index in store.masters]
    parts = {
        "parameter": sum(chunk.shard.nbytes for chunk in chunks) / numel,
        "master": sum(masters) / numel,
        "optimizer state": sum(update.state_bytes for update in updates) / numel,
        "gradient that waits for the step": sum(chunk.shard.nbytes for chunk in chunks) / numel if waiting else 0,
    }
    listed = ", ".join(f"{value:.3g} {name}" for name, value in parts.items() if value)
    return f"{sum(parts.values()):.3g} bytes per trained parameter: {listed}"


def _tier_line(tier: Tier) -> str:
    bound = f" of {format_bytes(tier.capacity)}" if tier.capacity is not None else ""
    return (
        f"{tier.name} memory of chunks: {format_bytes(tier.used)} in use, {format_bytes(tier.peak)} at the peak{bound}"
    )
