"""Writes a checkpoint: every rank its pieces, one after the other, then rank 0 commits them."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lightning_gemini.checkpoint.commit import Commit, must_share
from lightning_gemini.checkpoint.hashing import checksum, write_hashed
from lightning_gemini.checkpoint.location import open_folder
from lightning_gemini.checkpoint.lock import this_process
from lightning_gemini.checkpoint.manifest import (
    Manifest,
    Piece,
    StoredFile,
    StoredTensor,
    check_manifest,
    is_file_name,
    new_save_id,
)
from lightning_gemini.checkpoint.planning import first_failure, in_words, portable_errors, run_save
from lightning_gemini.checkpoint.tensor_file import TENSORS_SUFFIX, Entry, bytes_of, encode_header
from lightning_gemini.core.errors import CheckpointError, CheckpointWriteError


def save(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    attachments: Mapping[str, bytes],
    about: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
    save_id: str | None = None,
) -> None:
    """Saves a checkpoint at ``path``; all ranks of ``group`` have to call it.

    When it returns, the checkpoint is complete and on the disk, and what was at ``path`` before has been replaced. At
    any moment before that the old checkpoint is there, whole.

    Args:
        path: a folder, which need not exist, that all ranks see; or a URL that fsspec knows.
        tensors: by fully qualified name, of any dtype and on any device. What several ranks have must be equal on
            them and is written once. Objects that answer torch.distributed.checkpoint's ``__create_write_items__`` and
            ``__get_tensor_shard__`` write pieces; they are asked for one piece at a time.
        attachments: files to write beside the tensors, by name; those of rank 0 count.
        about: JSON for the manifest; that of rank 0 counts.
        group: the ranks that share the tensors, of a backend that exchanges objects in host memory (gloo); ``None``
            for a process alone.
        save_id: the name of this save, a fresh one if not given; that of rank 0 counts.

    Raises:
        CheckpointWriteError: a rank failed; on all ranks, with the same text. The old checkpoint stays.
    """
    writer = CheckpointWriter(path, attachments, about, group, save_id, tuple(tensors))
    try:
        run_save(tensors, writer, group)
    except BaseException as error:
        explained = writer.explain(error)
        rank, cause = first_failure(error, writer.rank)
        if not isinstance(cause, Exception) and rank == writer.rank:
            raise cause from None  # an interrupt of this process stays one
        raise explained from cause
    finally:
        writer.close()


class CheckpointWriter(StorageWriter):
    """The storage layer of a save for :func:`torch.distributed.checkpoint.save`; use :func:`save`.

    Arguments as of :func:`save`; ``order`` is that of the tensors' names in the manifest. One object is for one save.

    Attributes:
        rank: of this process in the group.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        attachments: Mapping[str, bytes],
        about: Mapping[str, Any],
        group: dist.ProcessGroup | None = None,
        save_id: str | None = None,
        order: Sequence[str] = (),
    ) -> None:
        self._order = order
        self._folder = open_folder(path)
        self._attachments = attachments
        self._about = about
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self._world_size = 1 if group is None else dist.get_world_size(group)
        self._save_id = save_id or new_save_id()
        self._commit = Commit(self._folder, self._save_id)
        self._files: dict[str, StoredFile] = {}

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Part of the interface; there is nothing to forget."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **options: Any) -> None:
        """Rank 0 takes the lock, looks at what is there and makes the save's folder."""
        if not is_coordinator:
            return
        with portable_errors():
            self._check_arguments()
            self._commit.begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuses what is not a tensor: torch.distributed.checkpoint would pickle it."""
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
                raise CheckpointError(f"{item.index.fqn!r} is not a tensor; other values belong into an attachment.")
            layout = item.tensor_data.properties.layout
            if layout != torch.strided:
                raise CheckpointError(f"{item.index.fqn!r} has the layout {layout}, expected torch.strided.")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tells every rank the name of the save."""
        return [dataclasses.replace(plan, storage_data=self._save_id) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes and synchronises this rank's pieces, one at a time; on rank 0 the attachments too."""
        with portable_errors():
            self._save_id = plan.storage_data
            try:
                results = self._write_pieces(plan.items, planner) if plan.items else []
                for name, data in self._attachments.items() if self.rank == 0 else ():
                    self._write_attachment(name, data)
                # the entries of the new files, which a file system keeps apart from their bytes
                self._folder.sync(self._save_id)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{error.filename or error} is not there, though rank 0 has made the folder for this save. "
                    f"{must_share(self._folder.where)}"
                ) from error
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commits, on rank 0, when all ranks have written, and then removes what was there before."""
        with portable_errors():
            self._commit.finish(self._manifest(metadata, results))

    def close(self) -> None:
        """Lets other writers in."""
        self._commit.close()

    def explain(self, error: BaseException) -> CheckpointWriteError:
        """Removes what this save has written; the error for all ranks, with the same text. Collective."""
        rank, cause = first_failure(error, self.rank)
        outcome = self._commit.undo() if self.rank == 0 else ""
        if self._group is not None:
            if isinstance(error, CheckpointException):
                box = [outcome]
                dist.broadcast_object_list(box, dist.get_global_rank(self._group, 0), self._group)
                outcome = box[0]
            else:
                outcome = f"The ranks have lost each other. {outcome}"
        who = f"rank {rank}: " if self._world_size > 1 else ""
        return CheckpointWriteError(f"{self._folder.where} could not be saved: {who}{in_words(cause)}. {outcome}")

    def _check_arguments(self) -> None:
        for name in self._attachments:
            if not is_file_name(name) or name.endswith(TENSORS_SUFFIX):
                raise CheckpointError(f"an attachment cannot be called {name!r}: it has to be a plain name of a file.")
        try:
            self._about = json.loads(json.dumps(self._about))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"what is said about the checkpoint has to be JSON: {error}.") from error

    def _write_pieces(self, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        # larger elements first: then every piece begins where readers can view it in its dtype
        pairs = sorted(((item, _entry(item)) for item in items), key=lambda pair: -pair[1].dtype.itemsize)
        entries = [entry for _, entry in pairs]
        name = f"rank{self.rank}{TENSORS_SUFFIX}"
        header = encode_header(entries, {"format": "pt", "save_id": self._save_id, "rank": str(self.rank)})
        end = len(header)
        pieces = []
        with self._folder.create(f"{self._save_id}/{name}") as file:
            file.write(header)
            for item, entry in pairs:
                xxh3 = write_hashed(file, _piece_parts(item, entry, planner))
                pieces.append(Piece(entry.offsets, entry.shape, name, end, entry.nbytes, xxh3))
                end += entry.nbytes
            file.sync()
        stored = StoredFile(end, checksum(header), len(header))
        return [
            WriteResult(item.index, piece.nbytes, (piece, stored))
            for (item, _), piece in zip(pairs, pieces, strict=True)
        ]

    def _write_attachment(self, name: str, data: bytes) -> None:
        with self._folder.create(f"{self._save_id}/{name}") as file:
            xxh3 = write_hashed(file, [memoryview(data)])
            file.sync()
        self._files[name] = StoredFile(len(data), xxh3)

    def _manifest(self, metadata: Metadata, results: list[list[WriteResult]]) -> Manifest:
        written: dict[str, dict[int, Piece]] = {}
        for result in itertools.chain.from_iterable(results):
            piece, file = result.storage_data
            self._files[piece.file] = file
            written.setdefault(result.index.fqn, {})[result.index.index or 0] = piece
        tensors = {}
        stored = metadata.state_dict_metadata
        for fqn in dict.fromkeys([*(name for name in self._order if name in stored), *stored]):
            tensor = stored[fqn]
            assert isinstance(tensor, TensorStorageMetadata)
            pieces = tuple(written[fqn][index] for index in range(len(tensor.chunks)))
            tensors[fqn] = StoredTensor(tensor.properties.dtype, tuple(tensor.size), pieces)
        writer = {**this_process(), "version": _package_version()}
        manifest = Manifest(self._save_id, self._world_size, self._files, tensors, self._about, writer)
        check_manifest(manifest)
        return manifest


def _entry(item: WriteItem) -> Entry:
    data = item.tensor_data
    assert data is not None
    return Entry(item.index.fqn, data.properties.dtype, tuple(data.chunk.offsets), tuple(data.chunk.sizes))


def _piece_parts(item: WriteItem, entry: Entry, planner: SavePlanner) -> Iterator[memoryview]:
    """The bytes of a piece, cut where its tensor makes it part by part (``tensor_parts``)."""
    # DefaultSavePlanner's; resolve_data looks there too
    tensor = getattr(planner, "state_dict", {}).get(item.index.fqn)
    cut = getattr(tensor, "tensor_parts", None)
    parts = cut(item.index) if cut is not None else None
    if parts is None:
        yield _piece_bytes(planner.resolve_data(item), entry)
        return
    left = math.prod(entry.shape)
    for part in parts:
        left -= part.numel()
        yield _piece_bytes(part, dataclasses.replace(entry, shape=tuple(part.shape)))
    if left:
        raise CheckpointError(f"{entry.key}: its parts do not have its {math.prod(entry.shape)} elements.")


def _piece_bytes(tensor: Tensor | io.BytesIO, entry: Entry) -> memoryview:
    """The bytes of a piece; those of the tensor itself where it is contiguous and in host memory."""
    assert isinstance(tensor, Tensor)
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise CheckpointError(
            f"{entry.key}: expected a piece of shape {entry.shape} and {entry.dtype}, got {tuple(tensor.shape)} and "
            f"{tensor.dtype}."
        )
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return bytes_of(data)


def _package_version() -> str:
    try:
        return version("lightning-gemini")
    except PackageNotFoundError:
        return "unknown"
