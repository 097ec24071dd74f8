"""What an engine holds where, in words."""

from __future__ import annotations

from lightning_gemini.core.chunk import Home
from lightning_gemini.core.memory import Tier, format_bytes
from lightning_gemini.core.store import Store


def memory_report(store: Store, moving: bool) -> str:
    """This rank's bytes per tier, now and at the peak, and what has been moved."""
    homes = {home: sum(chunk.home is home for chunk in store.chunks) for home in Home}
    where = {
        Home.FULL: "kept whole on the device",
        Home.DEVICE: "with their shards on the device",
        Home.HOST: "with their shards in host memory",
    }
    lines = [f"{count} chunks {where[home]}" for home, count in homes.items() if count]
    lines += [_tier_line(tier) for tier in (store.device, store.host) if tier.peak]
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


def _tier_line(tier: Tier) -> str:
    bound = f" of {format_bytes(tier.capacity)}" if tier.capacity is not None else ""
    return (
        f"{tier.name} memory of chunks: {format_bytes(tier.used)} in use, {format_bytes(tier.peak)} at the peak{bound}"
    )
