"""Where chunks have their homes before any step has been recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lightning_gemini.core.chunk import Home
from lightning_gemini.core.footprint import Footprints, working_set
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.refusal import Need, model_does_not_fit
from lightning_gemini.core.units import Unit

#: What a user asks for.
PlacementName = Literal["auto", "device", "host"]

#: The share of an accelerator that is left to what nobody has seen yet (activations) where everything is to stay there
#: for good. An emulated device has none of it.
_UNSEEN = 0.75


def fits_whole(footprints: Footprints, device: Tier, host: Tier, placement: PlacementName) -> bool:
    """Whether all chunks can be kept unsharded on the device, and need not move at all.

    What is in host memory even then has to fit there.

    Where that need not be decided for good, with what is frozen now but has an optimizer: once it is unfrozen it takes
    as much as the rest.
    """
    if placement == "host" or (host.capacity is not None and footprints.frozen_masters > host.capacity):
        return False
    if placement == "auto":
        updated = frozenset(chunk.index for chunk in footprints.layout.chunks if chunk.kind.updated)
        footprints = replace(footprints, unfrozen=updated)
    whole = sum(one.kept for one in footprints.all())
    if footprints.layout.world_size > 1:  # each rank has whole chunks beside its shards of the rest
        whole += sum(one.full - one.parameter for one in footprints.all()) + footprints.gradient_work()
    unseen = _UNSEEN if placement == "auto" and device.device.type != "cpu" else 0.0
    return device.capacity is None or whole <= device.capacity * (1 - unseen)


def first_homes(
    footprints: Footprints, units: Sequence[Unit], device: Tier, host: Tier, placement: PlacementName
) -> list[Home]:
    """Homes for chunks that are not kept whole: in host memory, as far as it has room, or all on the device.

    Masters of frozen chunks are in host memory in any case.

    Raises:
        OutOfBudgetError: it does not fit; with what is needed and what would make it fit.
    """
    every = footprints.all()
    aside = footprints.frozen_masters if placement == "device" else footprints.aside
    count, several = len(every), footprints.layout.world_size > 1
    homes = sum(one.kept for one in every)
    chunks, unit = working_set(footprints.layout, units)
    need = Need(
        footprints,
        # one gradient at a time is the least
        chunks + footprints.gradient_work(1),
        unit,
        host_holds=placement != "device",
    )
    if device.capacity is not None and need.working_set > device.capacity:
        raise model_does_not_fit(need, device, host, aside + (0 if placement == "device" else homes))
    if placement == "device":
        if not several or homes + need.working_set > (device.capacity or 0) or not host.room(aside):
            raise model_does_not_fit(need, device, host, aside)
        return [Home.DEVICE] * count
    first = [Home.HOST] * count
    spare = homes if device.capacity is None else device.capacity - need.working_set
    hosted = aside + homes
    for index in reversed(range(count)) if placement == "auto" else ():
        if host.capacity is not None and hosted > host.capacity and every[index].kept <= spare:
            hosted, spare = hosted - every[index].kept, spare - every[index].kept
            first[index] = Home.DEVICE if several else Home.FULL
    if host.capacity is None or hosted <= host.capacity:
        return first
    raise model_does_not_fit(need, device, host, hosted)
