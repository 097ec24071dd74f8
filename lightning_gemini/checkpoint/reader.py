"""Reads a checkpoint; no byte of it is used before its checksum is known to be right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from lightning_gemini.checkpoint.hashing import checksum
from lightning_gemini.checkpoint.kinds import why_not_sharded
from lightning_gemini.checkpoint.location import open_folder
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME, Manifest, Piece, decode_manifest
from lightning_gemini.checkpoint.planning import first_failure, in_words, portable_errors, run_load
from lightning_gemini.checkpoint.stored_files import StoredFiles, readable
from lightning_gemini.checkpoint.tensor_file import bytes_of
from lightning_gemini.core.errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    NotACheckpointError,
)

_SHOWN = 20


def load(
    reader: CheckpointReader,
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
    cast: bool = False,
    direct: bool = False,
) -> None:
    """Fills ``tensors`` from a checkpoint, whatever ranks have written it; all ranks of ``group`` have to call it.

    Args:
        reader: of the same checkpoint on every rank.
        tensors: where to, by fully qualified name, on any device. Objects that answer torch.distributed.checkpoint's
            ``__create_chunk_list__`` and ``__get_tensor_shard__`` are given their boxes. Names that are in the
            checkpoint and not here are left out.
        group: the ranks that load together; ``None`` for a process alone.
        cast: whether values may be converted to another dtype.
        direct: whether bytes may be read into ``tensors`` before their checksums are known, which needs no memory
            beside theirs. They may hold damaged values then, if this raises.

    Raises:
        IncompatibleCheckpointError: a tensor is not in the checkpoint, or has another shape or dtype there.
        CorruptCheckpointError: bytes are not as they were written; names file and tensor.
        CheckpointError: a file cannot be read, or ranks read different checkpoints.

        All ranks raise the same. ``tensors`` then hold old and new values.
    """
    try:
        run_load(tensors, reader, group, _LoadPlanner(reader, cast, direct))
    except BaseException as error:
        own = 0 if group is None else dist.get_rank(group)
        rank, cause = first_failure(error, own)
        if isinstance(cause, CheckpointError) or (rank == own and not isinstance(cause, Exception)):
            raise cause from None
        who = f"rank {rank}: " if group is not None else ""
        raise CheckpointError(f"{reader.where} could not be loaded: {who}{in_words(cause)}.") from cause


def open_checkpoint(path: str | PathLike[str], group: dist.ProcessGroup | None = None) -> CheckpointReader:
    """A reader of the checkpoint at ``path`` on every rank of ``group``; all of them have to call it.

    The ranks share the work of looking at the files.

    Raises:
        CheckpointError: as :class:`CheckpointReader`, the same on all ranks; or they found different checkpoints.
    """
    if group is None:
        return CheckpointReader(path)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine: CheckpointReader | None = None
    outcome: tuple[str, str] | CheckpointError
    try:
        mine = CheckpointReader(path, check=False)
        mine.check(sorted(mine.manifest.files)[rank::world_size])
        outcome = mine.identity
    except CheckpointError as error:
        outcome = error
    outcomes: list[Any] = [None] * world_size
    dist.all_gather_object(outcomes, outcome, group)
    for found in outcomes:
        if isinstance(found, CheckpointError):
            raise found
    _refuse_different(mine.where if mine else "", outcomes)
    assert mine is not None
    return mine


class CheckpointReader(StorageReader):
    """A checkpoint that is there, with all its files; their contents are checked as they are read.

    It is the storage layer of a load for :func:`torch.distributed.checkpoint.load` too. One thread at a time uses it.

    Args:
        path: the checkpoint's folder, or its URL.
        check: whether to look at all files at once; if not, :meth:`check` does.

    Attributes:
        where: the path, for messages.
        manifest: what is in it.
        identity: the save's id and the manifest's checksum, to tell whether two readers read the same.

    Raises:
        NotACheckpointError: there is no checkpoint of this package at the path; says what is.
        CorruptCheckpointError: the manifest or a file's header is damaged, a file is missing, has another length, or
            is of another save.
        IncompatibleCheckpointError: a newer version wrote it.
        CheckpointError: it cannot be read.
    """

    def __init__(self, path: str | PathLike[str], check: bool = True) -> None:
        folder = open_folder(path)
        self.where = folder.where
        with readable(self.where):
            raw = folder.read(MANIFEST_NAME) if folder.is_folder() else None
            if raw is None:
                raise NotACheckpointError(why_not_sharded(self.where))
        self.manifest: Manifest = decode_manifest(raw, folder.path(MANIFEST_NAME))
        self.identity = (self.manifest.save_id, checksum(raw))
        self._files = StoredFiles(folder, self.manifest, raw)
        if check:
            self.check(self.manifest.files)

    def check(self, files: Collection[str]) -> None:
        """Looks whether files are there, of the right length and with the right header.

        Raises:
            CorruptCheckpointError: one is not; the first is named.
            CheckpointError: one cannot be read.
        """
        for name in files:
            self._files.check(name)
        self._files.close()

    def attachment(self, name: str) -> bytes:
        """The file that was saved as ``name``.

        Raises:
            KeyError: there is none.
            CorruptCheckpointError: it is damaged.
        """
        if name not in self.manifest.attachments:
            raise KeyError(name)
        return self._files.read(name)

    def tensor(self, fqn: str) -> Tensor:
        """A whole tensor, in host memory.

        Raises:
            KeyError: there is none of this name.
            CorruptCheckpointError: a piece is damaged.
        """
        stored = self.manifest.tensors[fqn]
        result = torch.empty(stored.shape, dtype=stored.dtype)
        for piece in stored.pieces:
            target = _box(result, piece.offsets, piece.shape)
            if target.is_contiguous():
                self._fill(fqn, piece, target)
            else:
                target.copy_(self._piece(fqn, piece))
        return result

    def pieces(self, fqn: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The pieces of a tensor as they are stored, each with its offsets in the tensor; raises as :meth:`tensor`."""
        for piece in self.manifest.tensors[fqn].pieces:
            yield piece.offsets, self._piece(fqn, piece)

    def verify(self, files: Collection[str] | None = None, progress: Callable[[int], None] | None = None) -> None:
        """Reads every byte and compares every checksum.

        Args:
            files: the names of those to check, all by default; ranks can share the work.
            progress: told how many bytes were read since it was told last; they add up to the length of the files.

        Raises:
            CorruptCheckpointError: lists everything that is damaged.
            CheckpointError: a file cannot be read.
        """
        names = self.manifest.files if files is None else files
        told = progress or (lambda _: None)
        damages = [str(damage) for name in names for damage in self._files.damages(name, told)]
        self.close()
        if damages:
            more = [f"and {len(damages) - _SHOWN} more"] if len(damages) > _SHOWN else []
            raise CorruptCheckpointError("\n".join(damages[:_SHOWN] + more))

    def close(self) -> None:
        """Closes the file that was read last; reading opens it again."""
        self._files.close()

    # what torch.distributed.checkpoint asks for

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Part of the interface; there is nothing to forget."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The manifest in torch.distributed.checkpoint's words."""
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        return Metadata(
            {
                fqn: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.shape)) for p in tensor.pieces],
                )
                for fqn, tensor in self.manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **options: Any) -> None:
        """Part of the interface; all is set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Adds which checkpoint this rank reads."""
        return dataclasses.replace(plan, storage_data=self.identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Compares, on rank 0, which checkpoints the ranks read.

        Raises:
            CheckpointError: not the same.
        """
        _refuse_different(self.where, [plan.storage_data for plan in plans])
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads every piece that this rank needs once, and copies from it all that is needed of it."""
        with portable_errors():
            self._read_plan(plan, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_plan(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        wanted: dict[tuple[str, int], list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault((item.storage_index.fqn, item.storage_index.index or 0), []).append(item)
        buffer: Tensor | None = None
        direct = isinstance(planner, _LoadPlanner) and planner.direct
        for key in sorted(wanted, key=lambda key: (self._stored(key).file, self._stored(key).start)):
            piece, dtype = self._stored(key), self.manifest.tensors[key[0]].dtype
            targets = [planner.resolve_tensor(item).detach() for item in wanted[key]]
            parts = _parts(piece, dtype, wanted[key], targets) if direct else None
            if parts is not None:
                self._files.read_parts(key[0], piece, parts)
            else:
                if buffer is None:
                    buffer = torch.empty(max(self._stored(key).nbytes for key in wanted), dtype=torch.uint8)
                source = buffer[: piece.nbytes].view(dtype).view(piece.shape)
                self._fill(key[0], piece, source)
                for item, target in zip(wanted[key], targets, strict=True):
                    target.copy_(_box(source, item.storage_offsets, item.lengths))
            for item, target in zip(wanted[key], targets, strict=True):
                planner.commit_tensor(item, target)
        self.close()

    def _stored(self, key: tuple[str, int]) -> Piece:
        return self.manifest.tensors[key[0]].pieces[key[1]]

    def _piece(self, fqn: str, piece: Piece) -> Tensor:
        result = torch.empty(piece.shape, dtype=self.manifest.tensors[fqn].dtype)
        self._fill(fqn, piece, result)
        return result

    def _fill(self, fqn: str, piece: Piece, target: Tensor) -> None:
        """Reads a piece into a contiguous tensor of its dtype and shape in host memory."""
        self._files.read_piece(fqn, piece, bytes_of(target))


class _LoadPlanner(DefaultLoadPlanner):
    """Refuses, with a list, where names, shapes or dtypes differ; without it torch would name the first or cast."""

    def __init__(self, reader: CheckpointReader, cast: bool, direct: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._reader = reader
        self._cast = cast
        self.direct = direct

    def create_local_plan(self) -> LoadPlan:
        with portable_errors():
            differences = list(self._differences())
            if differences:
                more = [f"and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
                raise IncompatibleCheckpointError(
                    f"{self._reader.where} does not fit:\n" + "\n".join(differences[:_SHOWN] + more)
                )
            return super().create_local_plan()

    def _differences(self) -> Iterator[str]:
        stored = self._reader.manifest.tensors
        for fqn, tensor in self.state_dict.items():
            if fqn not in stored:
                yield f"  {fqn}: not in the checkpoint"
            elif tuple(tensor.shape) != stored[fqn].shape:
                yield f"  {fqn}: has the shape {tuple(tensor.shape)}, in the checkpoint {stored[fqn].shape}"
            elif tensor.dtype != stored[fqn].dtype and not self._cast:
                yield f"  {fqn}: is {tensor.dtype}, in the checkpoint {stored[fqn].dtype}"


def _refuse_different(where: str, identities: list[tuple[str, str]]) -> None:
    for rank, identity in enumerate(identities):
        if identity != identities[0]:
            raise CheckpointError(
                f"the ranks read different checkpoints at {where}: rank 0 that of save {identities[0][0]}, rank {rank} "
                f"that of save {identity[0]}. It was overwritten while they began to read it; load again."
            )


def _box(tensor: Tensor, offsets: Collection[int], lengths: Collection[int]) -> Tensor:
    """A view of the box of ``tensor`` at ``offsets``."""
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def _parts(
    piece: Piece, dtype: torch.dtype, items: Sequence[ReadItem], targets: Sequence[Tensor]
) -> list[tuple[int, memoryview]] | None:
    """Where the bytes of a piece that ``items`` are about go, if each wants a run of them for memory of its own."""
    parts: list[tuple[int, memoryview]] = []
    for item, target in zip(items, targets, strict=True):
        first = _first_of_run(piece.shape, item.storage_offsets, item.lengths)
        if first is None or target.dtype != dtype or target.device.type != "cpu" or not target.is_contiguous():
            return None
        parts.append((first * dtype.itemsize, bytes_of(target)))
    parts.sort(key=lambda part: part[0])
    ends = [first + len(target) for first, target in parts]
    return parts if all(end <= first for end, (first, _) in zip(ends, parts[1:], strict=False)) else None


def _first_of_run(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> int | None:
    """The first element of a box of a row-major tensor, if its elements follow one another in memory."""
    first, stride, whole = 0, 1, True
    for size, offset, length in zip(reversed(shape), reversed(offsets), reversed(lengths), strict=True):
        if length != 1 and not whole:
            return None
        first += offset * stride
        stride *= size
        whole = whole and length == size
    return first
