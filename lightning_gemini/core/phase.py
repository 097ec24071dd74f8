"""What may be done with an engine."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """What may be done with an engine."""

    LIVE = "live"  #: forward, backward, step
    SUMMONED = "summoned"  #: the parameters are ordinary tensors for a while; nothing is scheduled
    SAVING = "saving"  #: the state is looked at, and does not change
    RELEASED = "released"  #: the model is an ordinary module again; nothing
