"""What an engine has done, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What has been moved since the engine was made; exact, so that tests can assert it."""

    unshards: int = 0  #: chunks made resident
    prefetched: int = 0  #: of these, begun before somebody needed them
    reshards: int = 0  #: chunks freed
    gathered_bytes: int = 0  #: bytes that arrived from other ranks in unshards and refreshes
    fetched_bytes: int = 0  #: bytes copied from the host tier to the device for unshards
    offloaded_bytes: int = 0  #: bytes of gradients copied from the device to the host tier
    rehomed_bytes: int = 0  #: bytes copied from one tier to the other because a chunk has got another home
    reduces: int = 0  #: reduce-scatters of a chunk's gradients
    reduced_bytes: int = 0  #: bytes that this rank sent for them
    updates: int = 0  #: chunks that an optimizer step has changed
    followed: int = 0  #: steps, of all kinds, that went by their plan from beginning to end
    strayed: int = 0  #: steps that began by a plan and went otherwise
    skipped: int = 0  #: steps that were not taken because of gradients that are not finite
