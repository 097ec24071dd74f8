"""What each chunk takes on one rank, and what it moves: exact bytes, from the layout and the settings alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.layout import ChunkSpec, Layout
from lightning_gemini.core.state_width import StateWidths
from lightning_gemini.core.step_plan import ChunkBytes
from lightning_gemini.core.units import Unit
from lightning_gemini.core.update_policy import UpdatePolicy

#: Reductions that have buffers at one time: one that fills, and those under way.
_REDUCING_AT_ONCE = 3


#: Updates within a backward that are under way in the background at one time: their gradients are there meanwhile.
EARLY_AT_ONCE = 2


@dataclass(frozen=True)
class Footprint:
    """The bytes of one chunk on one rank, by what they are for.

    Attributes:
        full: the unsharded chunk.
        parameter: its shard.
        master: of the shard, beside it.
        state: of the optimizer.
        gradient: the reduced shard that waits for the step.
        extra: whatever else lives beside the shard, such as an average.
    """

    full: int
    parameter: int
    master: int
    state: int
    gradient: int
    extra: int

    @property
    def kept(self) -> int:
        """All that lives where the chunk's home is, with the home not in the unsharded chunk."""
        return self.parameter + self.master + self.state + self.gradient + self.extra


@dataclass(frozen=True)
class Footprints:
    """Computes the footprints of all chunks.

    Args:
        layout: the chunks.
        policy: the dtypes.
        update: whether gradients wait.
        widths: how much state the optimizers keep.
        dtypes: of the layout's parameters before it was made.
        unfrozen: chunks that are updated though they were frozen when the layout was made.
    """

    layout: Layout
    policy: DtypePolicy
    update: UpdatePolicy
    widths: StateWidths
    dtypes: Sequence[torch.dtype]
    unfrozen: frozenset[int] = frozenset()

    def all(self, accumulating: bool = False, extra: Mapping[int, int] | None = None) -> list[Footprint]:
        """One for each chunk.

        Args:
            accumulating: whether gradient shards are kept in fp32.
            extra: bytes beside the shards, by chunk.
        """
        return [self._of(spec, accumulating, (extra or {}).get(spec.index, 0)) for spec in self.layout.chunks]

    def _of(self, spec: ChunkSpec, accumulating: bool, extra: int) -> Footprint:
        numel, dtype = spec.numel // self.layout.world_size, spec.kind.dtype
        parameter = numel * dtype.itemsize
        if not self.trained(spec):
            return Footprint(spec.nbytes, parameter, 0, 0, 0, extra)
        width = torch.promote_types(dtype, torch.float32).itemsize if accumulating else dtype.itemsize
        return Footprint(
            full=spec.nbytes,
            parameter=parameter,
            master=numel * self.policy.master_bytes(dtype),
            state=int(self._elements(spec) * self.widths.of(spec, self.policy)),
            gradient=numel * width if self.update.when == "at_step" else 0,
            extra=extra,
        )

    def _elements(self, spec: ChunkSpec) -> int:
        """Elements that an update changes: not the padding at the end, which on several ranks is another one's."""
        return min(spec.numel // self.layout.world_size, spec.end) if self.trained(spec) else 0

    def trained(self, spec: ChunkSpec) -> bool:
        """Whether a step updates the chunk, as far as is known by now."""
        return trained(spec) or spec.index in self.unfrozen

    def has_master(self, spec: ChunkSpec) -> bool:
        """Whether the chunk has a master from the beginning: it is trained, or would lose bits without one."""
        dtype = spec.kind.dtype
        wider = any(self.dtypes[slot.param].itemsize > dtype.itemsize for slot in spec.slots)
        return self.policy.needs_master(dtype) and (trained(spec) or wider)

    @property
    def aside(self) -> int:
        """Bytes of host memory on one rank beside homes, if there are any homes there."""
        return self.frozen_masters + self.landing

    @property
    def landing(self) -> int:
        """Bytes of gradients in host memory that are used within their backward, at one time."""
        if self.update.when == "at_step":
            return 0
        sizes = [spec.nbytes // self.layout.world_size for spec in self.layout.chunks if self.trained(spec)]
        return sum(sorted(sizes)[-EARLY_AT_ONCE - 1 :])  # and one that lands

    @property
    def frozen_masters(self) -> int:
        """Bytes of the masters of frozen chunks on one rank: in host memory, wherever the chunks' homes are."""
        return sum(
            spec.numel // self.layout.world_size * self.policy.master_bytes(spec.kind.dtype)
            for spec in self.layout.chunks
            if self.has_master(spec) and not self.trained(spec)
        )

    @property
    def ruled(self) -> bool:
        """Whether rules update all chunks that are updated; then they could have states in bf16."""
        chunks = (spec for spec in self.layout.chunks if trained(spec))
        return all(self.widths.rule(spec, self.policy) is not None for spec in chunks)

    @property
    def in_fp32(self) -> bool:
        """Whether all chunks that are updated, and there are some, are computed in fp32."""
        return {spec.kind.dtype for spec in self.layout.chunks if trained(spec)} == {torch.float32}

    def moved(self, footprints: Sequence[Footprint], whole: bool) -> list[ChunkBytes]:
        """The same, as the planner sees it; ``whole`` says whether a home on the device is the unsharded chunk."""
        return [
            ChunkBytes(
                full=one.full,
                kept=one.kept,
                hosted=one.kept,
                fetch=one.parameter,
                gather=one.full - one.parameter if whole or self.layout.world_size > 1 else one.full,
                offload=self._offload(one, spec),
                trained=self.trained(spec),
                whole=whole,
                # what is updated in a backward is part of its moments
                elements=self._elements(spec) if self.update.when == "at_step" else 0,
            )
            for one, spec in zip(footprints, self.layout.chunks, strict=True)
        ]

    def _offload(self, one: Footprint, spec: ChunkSpec) -> int:
        """One rank's gradients cross in the dtype that they come in, also while they add up in fp32 there."""
        if not self.trained(spec):
            return 0
        return one.gradient if one.gradient and self.layout.world_size > 1 else one.parameter

    def gradient_work(self, at_once: int = _REDUCING_AT_ONCE) -> int:
        """Bytes of the buffers that gradients fill, and on several ranks are reduced through; ``at_once`` of them.

        On several ranks each has its result and space for what others send beside it.
        """
        several = self.layout.world_size > 1
        sizes = sorted(
            (
                spec.numel * (self.policy.reduce_dtype(spec.kind.dtype) if several else spec.kind.dtype).itemsize
                for spec in self.layout.chunks
                if self.trained(spec)
            ),
            reverse=True,
        )
        return 2 * sum(sizes[:at_once]) if several else sum(sizes[:1])


def trained(spec: ChunkSpec) -> bool:
    """Whether a step updates the chunk, as things stand; one that is unfrozen later takes its memory then."""
    return spec.kind.trainable and spec.kind.updated


def working_set(layout: Layout, units: Sequence[Unit]) -> tuple[int, str]:
    """Bytes of the unsharded chunks that have to be there at one time, at the least, and for which unit.

    Those are a unit's own and those of the units around it, whose forwards are running.
    """
    own = {unit.name: {layout.place(param)[0] for param in unit.params} for unit in units}
    most, where = 0, "the model"
    for unit in units:
        around = [name for name in own if name == "model" or unit.name == name or unit.name.startswith(f"{name}.")]
        chunks = set().union(*(own[name] for name in around)) if own[unit.name] else set()
        nbytes = sum(layout.chunks[index].nbytes for index in chunks)
        if nbytes > most:
            most, where = nbytes, unit.name
    return most, where
