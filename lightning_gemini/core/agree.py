"""The ranks agree: tags on what is gathered, one vote a step.

NOTE: one tag per chunk.
A chunk's tag is its last element, so it lies in the last rank's shard and reaches every rank with each gather. If not
all ranks gather the same chunk, at least one of them gathers another one than the last rank does, and that one reads a
tag it did not expect. A tag at the end of every shard would say no more, and would cut parameters in two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gemini.core.errors import DisagreementError
from lightning_gemini.core.layout import Layout


def chunk_tag(layout: Layout, chunk: int) -> int:
    """The int32 that marks chunk number ``chunk`` of this layout."""
    return (layout.fingerprint + chunk) % 2**31


class TagBook:
    """Compares the tags of gathered chunks with the expected ones.

    On the CPU at once, so that the first wrong gather ends the step. A device would have to be waited for: there the
    tags are set aside and compared when :meth:`settle` is called, before an update and after a step of an evaluation.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._at_once = device.type == "cpu"
        self._noted: list[tuple[int, str, Tensor]] = []

    def note(self, chunk: int, tag: Tensor, reason: str) -> None:
        """Looks at a gathered tag (int32, one element); ``reason`` is what this rank needed the chunk for.

        Raises:
            DisagreementError: another chunk came.
        """
        self._noted.append((chunk, reason, tag if self._at_once else tag.clone()))
        if self._at_once:
            self.settle()

    def settle(self) -> None:
        """Compares what has been noted.

        Raises:
            DisagreementError: another chunk came for one of them; the first one is named.
        """
        noted, self._noted = self._noted, []
        if not noted:
            return
        for (chunk, reason, _), found in zip(noted, torch.cat([tag for _, _, tag in noted]).tolist(), strict=True):
            self.compare(chunk, found, reason)

    def compare(self, chunk: int, found: int, reason: str) -> None:
        """Compares the tag that came with the one of ``chunk``, which this rank needed for ``reason``.

        Raises:
            DisagreementError: they differ.
        """
        if found == chunk_tag(self._layout, chunk):
            return
        other = (found - self._layout.fingerprint) % 2**31
        known = other < len(self._layout.chunks)
        raise DisagreementError(
            f"the ranks do not run the same units: this rank gathered chunk {chunk} for {reason}, but another rank "
            f"sent {f'chunk {other}' if known else 'a chunk of another size'}. Control flow must not depend on the "
            "rank; if it has to, name a module around the branch in unit_modules, or keep all chunks unsharded "
            "(placement='device' with room for them)."
        )
