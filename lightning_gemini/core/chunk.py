"""One chunk: a storage that is made once, the parameters that are views of it, and its states."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_gemini.core.errors import StateError
from lightning_gemini.core.layout import ChunkSpec, ParamSpec
from lightning_gemini.core.memory import Tier


class ChunkState(IntEnum):  # an Enum's hash is slow, and every unit moves chunks through the table below
    """What a chunk's unsharded storage is doing, and the device memory that costs."""

    FREE = 0  #: no storage; its parameters are shape-only placeholders
    COMING = 1  #: a storage that is being filled; its parameters are placeholders still: ``numel`` elements
    HELD = 2  #: unsharded and idle: ``numel`` elements
    COMPUTE = 3  #: unsharded and in use by a unit or by autograd: ``numel`` elements


class Home(Enum):
    """Where a chunk's shard, the truth between two steps, lives."""

    FULL = "full"  #: in its slice of the unsharded chunk, which is never freed
    DEVICE = "device"  #: in a storage of its own on the device
    HOST = "host"  #: in a storage of its own in host memory


_TRANSITIONS = {
    (ChunkState.FREE, ChunkState.COMING),
    (ChunkState.COMING, ChunkState.HELD),
    (ChunkState.COMING, ChunkState.FREE),  # it could not be filled
    (ChunkState.HELD, ChunkState.FREE),
    (ChunkState.HELD, ChunkState.COMPUTE),
    (ChunkState.COMPUTE, ChunkState.HELD),
}


class Deferred(Protocol):
    """An update of a chunk's shard that is under way in another thread."""

    def wait(self) -> None:
        """Waits until it is over; the chunk's :attr:`Chunk.deferred` is ``None`` then.

        Raises:
            UpdateError: it failed, now or before; then it stays where it is, so that nobody reads the shard.
        """

    def then(self, job: Callable[[], None]) -> bool:
        """Has ``job`` done by the same thread as soon as the update is over; not if it is over: then it says False."""


class Chunk:
    """The storage of one :class:`ChunkSpec`, seen by its parameters.

    The storage object is made once and only ever resized: autograd keeps aliases of it (``weight.t()`` is a view), and
    these stay valid when a chunk is freed and filled again. Parameters are bound by ``p.data = view``: ``nn.Parameter``
    of the view would share its version counter, and every fill would look like a change made by the user.

    Attributes:
        full: the flat unsharded buffer, ``spec.numel`` elements; without storage while FREE.
        own: this rank's slice of ``full``, a view.
        deferred: the update of the shard that is under way, if there is one.
        params: the parameters, in the order of ``spec.slots``; ``names``, ``shapes`` and ``strides`` likewise.
    """

    def __init__(
        self,
        spec: ChunkSpec,
        specs: Sequence[ParamSpec],
        params: Sequence[nn.Parameter],
        home: Home,
        shard: Tensor | None,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.index = spec.index
        self.params = tuple(params)
        self.names = tuple(info.name for info in specs)
        self.shapes = tuple(info.shape for info in specs)
        self.strides = tuple(info.stride for info in specs)
        self._starts = tuple(slot.offset for slot in spec.slots)
        self.home = home
        self.pins = 0
        self.state = ChunkState.HELD if home is Home.FULL else ChunkState.FREE
        dtype, numel = spec.kind.dtype, spec.numel // world_size
        with torch.inference_mode(False):
            # zeros, not empty: padding takes part in norms and updates
            self.full = torch.zeros(spec.numel, dtype=dtype, device=device)
            self.own = self.full.narrow(0, rank * numel, numel)
            self.tag = self.full.view(torch.uint8)[-4:].view(torch.int32)
            self._views = tuple(self.view_in(self.full, slot) for slot in range(len(specs)))
            self._placeholders = tuple(placeholder(info.shape, dtype, device) for info in specs)
            self._shard = self.own if shard is None else shard
            self.deferred: Deferred | None = None
            if shard is None:
                self._point_params_at(self._views)
            else:
                self.full.untyped_storage().resize_(0)
                self._point_params_at(self._placeholders)

    @property
    def shard(self) -> Tensor:
        """``spec.numel // world_size`` elements that hold the truth; ``own`` itself if the home is FULL.

        Waits for an update that is under way, and raises what it raised.
        """
        if self.deferred is not None:
            self.deferred.wait()
        return self._shard

    def after_update(self, job: Callable[[], None]) -> None:
        """Has ``job`` done now, or as soon as the update that is under way is over, by the thread that makes it.

        It may use :attr:`unfinished_shard` and what lies beside it, and no other attribute.
        """
        if self.deferred is None or not self.deferred.then(job):
            job()

    @property
    def unfinished_shard(self) -> Tensor:
        """The shard, which an update may be writing to: not to be looked at before that is over."""
        return self._shard

    @property
    def resident(self) -> bool:
        """Whether the chunk is unsharded, so that its parameters have their values."""
        return self.state in (ChunkState.HELD, ChunkState.COMPUTE)

    def allocate(self, tier: Tier) -> None:
        """FREE -> COMING: gives ``full`` its storage in ``tier``, with undefined content.

        Raises:
            OutOfBudgetError: the system has no memory for it.
        """
        self._move(ChunkState.COMING)
        storage, nbytes = self.full.untyped_storage(), self.spec.nbytes
        try:
            tier.allocate(lambda: storage.resize_(nbytes), nbytes, f"chunk {self.index}")
        except BaseException:
            self._move(ChunkState.FREE)
            raise

    def hold(self) -> None:
        """COMING -> HELD, once ``full`` has been filled: the parameters see their values."""
        self._move(ChunkState.HELD)
        self._point_params_at(self._views)

    def settle(self, home: Home, shard: Tensor) -> None:
        """Gives the chunk another home; ``shard`` holds its values there, and is :attr:`own` where that is FULL."""
        self.home, self._shard = home, shard

    def free(self) -> None:
        """HELD or COMING -> FREE: the parameters become placeholders and the storage goes."""
        if self.home is Home.FULL:
            raise StateError(f"chunk {self.index} lives in its unsharded storage and cannot be freed")
        if not self.full.untyped_storage().resizable():
            raise StateError(
                f"chunk {self.index}, with {self.names[0]} in it, cannot be freed: somebody shares its memory, as "
                "weight.numpy() does. Take a copy: weight.detach().clone().numpy()."
            )
        self._move(ChunkState.FREE)
        self._point_params_at(self._placeholders)
        self.full.untyped_storage().resize_(0)

    def pin(self) -> None:
        """HELD -> COMPUTE for one more user; the chunk stays until each has called :meth:`unpin`."""
        if self.pins == 0:
            self._move(ChunkState.COMPUTE)
        self.pins += 1

    def unpin(self) -> None:
        """One user less; the last one makes it COMPUTE -> HELD."""
        if self.pins == 0:
            raise StateError(f"chunk {self.index} is not in use")
        self.pins -= 1
        if self.pins == 0:
            self._move(ChunkState.HELD)

    def rebind(self) -> None:
        """Points the parameters at the chunk again, after they have been given other tensors."""
        self._point_params_at(self._views if self.resident else self._placeholders)

    def let_go(self) -> None:
        """Points the parameters at nothing of this chunk any more."""
        self._point_params_at(self._placeholders)

    def strayed(self) -> list[str]:
        """The names of parameters that have been given other data than this chunk's."""
        bound = self._views if self.resident else self._placeholders
        pairs = zip(self.names, self.params, bound, strict=True)
        return [name for name, param, tensor in pairs if param.data_ptr() != tensor.data_ptr()]

    def placeholder_storages(self) -> list[tuple[str, int]]:
        """Each parameter's name, and the identity of the storage that it has while the chunk is free."""
        pairs = zip(self.names, self._placeholders, strict=True)
        return [(name, tensor.untyped_storage()._cdata) for name, tensor in pairs]

    def slot_at(self, offset: int) -> int:
        """The slot that holds element ``offset`` of the unsharded chunk."""
        return bisect_right(self._starts, offset) - 1

    def view_in(self, flat: Tensor, slot: int) -> Tensor:
        """The ``slot``-th parameter's view of a flat buffer of this chunk's layout, such as its gradient's."""
        return flat.as_strided(self.shapes[slot], self.strides[slot], self.spec.slots[slot].offset)

    def view(self, slot: int) -> Tensor:
        """The unsharded value of the ``slot``-th parameter, in its own shape; only while resident."""
        if not self.resident:
            raise StateError(f"chunk {self.index} is not unsharded")
        return self._views[slot]

    def _move(self, state: ChunkState) -> None:
        if (self.state, state) not in _TRANSITIONS:
            raise StateError(f"chunk {self.index} cannot go from {self.state.name} to {state.name}")
        self.state = state

    def _point_params_at(self, tensors: Sequence[Tensor]) -> None:
        for param, tensor in zip(self.params, tensors, strict=True):
            param.data = tensor


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``shape`` that takes the memory of one element.

    A read gives NaN (zero for integers), a write in place raises.
    """
    value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), value, dtype=dtype, device=device).expand(tuple(shape))
