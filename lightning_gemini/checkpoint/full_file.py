"""Checkpoints in one file, as ``torch.save`` writes them: a zip archive whose records carry CRC-32 checksums.

``torch.load`` looks at none of these, so a flipped bit loads as a wrong number; :func:`verify_full` does.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from lightning_gemini.checkpoint.output import replacing, with_checksums
from lightning_gemini.core.errors import CheckpointError, CorruptCheckpointError, NotACheckpointError

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
_READ_BYTES = 1 << 20

Progress = Callable[[int], None]


def write_full(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes ``checkpoint`` as one file that ``torch.load`` reads, with a checksum for each tensor.

    The file is there whole or not at all; see :func:`replacing`. On one process; tensors on a device come to host
    memory one at a time.

    Args:
        path: local, or of any file system that fsspec knows.

    Raises:
        CheckpointWriteError: it could not be written, or something in it cannot be pickled; the file that was there
            stays.
    """
    with replacing(path) as file, with_checksums():
        torch.save(checkpoint, file)  # type: ignore[arg-type]


def read_full(
    path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None, check: bool = True
) -> dict[str, Any]:
    """Reads a checkpoint in one file, after all that is in it has been compared with its checksums.

    The tensors of a local file are views of it: pages are read where they are looked at, and change in memory only.

    Args:
        path: local, or of any file system that fsspec knows; that is read twice.
        map_location: where tensors go to, as for ``torch.load``.
        weights_only: ``False`` loads objects of any class, which can run any code. By default only tensors, plain
            values, and classes allowed with ``torch.serialization.add_safe_globals``.
        check: ``False`` leaves the comparison out, where :func:`verify_full` has been called already.

    Raises:
        NotACheckpointError: there is no file, or it is not one of ``torch.save``.
        CorruptCheckpointError: it is damaged; names the record, and the tensor where that can be told.
        CheckpointError: it cannot be opened, changed meanwhile, or holds classes that ``weights_only`` does not allow.
    """
    where = os.fspath(path)
    fs, name = url_to_fs(where)
    before = _identity(fs, name)
    if check:
        verify_full(path)
    content = _load(fs, name, where, map_location, weights_only is not False)
    if _identity(fs, name) != before:
        raise CheckpointError(f"{where} was replaced while it was read: another run writes to it. Load it again.")
    if not isinstance(content, dict):
        raise NotACheckpointError(
            f"{where} holds a {type(content).__name__}, and a checkpoint is a dict. It was saved with torch.save by "
            "something else than a Trainer."
        )
    return content


def verify_full(
    path: str | os.PathLike[str], share: tuple[int, int] = (0, 1), progress: Progress = lambda _: None
) -> bool:
    """Compares the records of a file with their checksums.

    Args:
        share: rank and number of ranks, to look at this rank's part of the records only.
        progress: called with numbers of bytes that have been read.

    Padding between the records is not looked at, nor what no reader uses of their headers.

    Returns:
        whether the file has checksums. Without them (an old format, or ``compute_crc32`` switched off) it warns, and
        only a few kinds of damage would show.

    Raises:
        NotACheckpointError: there is no file, or it is not one of ``torch.save``.
        CorruptCheckpointError: a record is damaged or missing.
        CheckpointError: the file cannot be opened.
    """
    where = os.fspath(path)
    with _open(path) as file:
        if not _is_zip(file, where):
            return _warn(where, "of a format of before PyTorch 1.6")
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                if not any(record.CRC for record in records):
                    return _warn(where, "without checksums (torch.serialization.set_crc32_options)")
                for record in _dealt(records, share):
                    _check(archive, record, where, progress)
                if not any(record.filename.endswith("/data.pkl") for record in records):
                    raise NotACheckpointError(f"{where} is a zip archive, but not one of torch.save.")
        except CheckpointError:
            raise
        except Exception as error:
            # a zip's damaged directory shows in many ways
            raise CorruptCheckpointError(f"{where} is damaged, or was cut off: {error}. {_ANOTHER}") from error
    return True


_ANOTHER = "Use another checkpoint."


def _check(archive: zipfile.ZipFile, record: zipfile.ZipInfo, where: str, progress: Progress) -> None:
    try:
        with archive.open(record) as content:
            while data := content.read(_READ_BYTES):
                progress(len(data))
    except Exception as error:
        names = _tensors_of(where, record)
        what = f" ({', '.join(names)})" if names else ""
        raise CorruptCheckpointError(
            f"{where} is damaged: its record {record.filename!r}{what} is not what was written: {error}. {_ANOTHER}"
        ) from error


def _dealt(records: Sequence[zipfile.ZipInfo], share: tuple[int, int]) -> list[zipfile.ZipInfo]:
    """This rank's part of the records, about as many bytes as the others have, in the order of the file."""
    rank, ranks = share
    mine = sorted(records, key=lambda record: record.file_size)[rank::ranks]
    return sorted(mine, key=lambda record: record.header_offset)


def _warn(where: str, what: str) -> bool:
    warnings.warn(
        f"{where} is a file {what}, so damage in it may go unnoticed. Saving it anew adds checksums.", stacklevel=3
    )
    return False


def _is_zip(file: IO[bytes], where: str) -> bool:
    head = file.read(len(ZIP_MAGIC))
    file.seek(0)
    if not head:
        raise CorruptCheckpointError(f"{where} is empty. {_ANOTHER}")
    if head == ZIP_MAGIC or zipfile.is_zipfile(file):
        file.seek(0)
        return True
    if not head.startswith(PICKLE_MAGIC):
        raise NotACheckpointError(f"{where} is not a file of torch.save: it begins with {head!r}.")
    return False


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    fs, name = url_to_fs(os.fspath(path))
    try:
        file = fs.open(name, "rb")
    except FileNotFoundError as error:
        raise NotACheckpointError(f"there is no file {path}.") from error
    except IsADirectoryError as error:
        raise NotACheckpointError(f"{path} is a folder, expected a file.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}.") from error
    with file:
        yield file


def _identity(fs: AbstractFileSystem, name: str) -> tuple[Any, ...]:
    """Differs between a file and the one that takes its place."""
    try:
        if isinstance(fs, LocalFileSystem):
            found = os.stat(name)
            return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        fs.invalidate_cache()
        info = fs.info(name)
        return tuple(str(info.get(key)) for key in ("size", "ETag", "etag", "mtime", "LastModified", "created"))
    except OSError:
        return ()  # opening it says why


def _load(fs: AbstractFileSystem, name: str, where: str, map_location: Any, weights_only: bool) -> Any:
    local = isinstance(fs, LocalFileSystem)
    try:
        if local and zipfile.is_zipfile(name):
            return torch.load(name, map_location, weights_only=weights_only, mmap=True)
        with fs.open(name, "rb") as file:
            return torch.load(file, map_location, weights_only=weights_only, mmap=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if weights_only and isinstance(error, pickle.UnpicklingError) and (refused := _refused(fs, name)):
            raise CheckpointError(
                f"{where} holds objects of {', '.join(refused)}, which are not loaded by default, since that can run "
                "any code. If you trust whoever wrote the file, pass weights_only=False (to trainer.fit, validate, "
                "test or predict), or allow these with torch.serialization.add_safe_globals."
            ) from error
        raise CorruptCheckpointError(f"{where} cannot be read: {error}. {_ANOTHER}") from error


def _refused(fs: AbstractFileSystem, name: str) -> list[str]:
    """The classes and functions in a file that are not allowed; empty if it cannot be told."""
    try:
        with fs.open(name, "rb") as file:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:
        return []


def _tensors_of(where: str, record: zipfile.ZipInfo) -> list[str]:
    """The keys of the tensors that are stored in a record; empty where that cannot be told."""
    try:
        fs, name = url_to_fs(where)
        with fs.open(name, "rb") as file:
            content = torch.load(file, "meta", weights_only=True)
            file.seek(0)
            records: Any = torch._C.PyTorchFileReader(file)
            start = records.get_record_offset(record.filename.partition("/")[2])
    except Exception:
        return []
    return [key for key, tensor in tensors_in(content) if place_in_file(tensor) == start]


def place_in_file(tensor: Tensor) -> int | None:
    """Where the storage of a tensor begins in the file from which it was loaded to ``meta``, in bytes."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, lists and tuples, each with the way to it, as ``state_dict.layer.weight``."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from tensors_in(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from tensors_in(child, f"{path}.{index}")
