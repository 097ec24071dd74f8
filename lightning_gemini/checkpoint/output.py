"""A file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from secrets import token_hex
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.utils.serialization import config
from typing_extensions import override

from lightning_gemini.checkpoint import operations as _operations
from lightning_gemini.core.errors import CheckpointError, CheckpointWriteError

_BUFFER_BYTES = 1 << 20
_LONGEST_NAME = 200  # bytes of the 255 that a name has, so that there is room for what is added
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # of a folder: its file system, or no right to read it


class Output(io.RawIOBase):
    """Where the new content goes; small writes are collected.

    Args:
        sink: writes some of the bytes it is given and returns how many, or ``None`` for all of them, as ``write`` of
            raw files and of others does.

    Attributes:
        error: the first exception of ``sink``. Every write after it raises it again: ``torch.save`` goes on writing
            behind an exception, and raises another one.
    """

    def __init__(self, sink: Callable[[memoryview], int | None]) -> None:
        self._sink = sink
        self._buffer = bytearray()
        self.error: BaseException | None = None

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(self._buffer) + len(view) > _BUFFER_BYTES:
            self.hand_on()
        if len(view) > _BUFFER_BYTES:
            self._send(view)
        else:
            self._buffer += view
        return len(view)

    def hand_on(self) -> None:
        """Gives the sink what has been collected."""
        content, self._buffer = self._buffer, bytearray()
        self._send(memoryview(content))

    def _send(self, view: memoryview) -> None:
        if self.error is not None:
            raise self.error
        try:
            while len(view):
                written = self._sink(view)
                view = view[len(view) if written is None else written :]
        except BaseException as error:
            self.error = error
            raise


def with_checksums() -> AbstractContextManager[None]:
    """Around ``torch.save``: has it compute checksums, whatever this process has set otherwise."""
    patched: AbstractContextManager[None] = config.patch("save.compute_crc32", True)  # type: ignore[attr-defined]
    return patched


class _NotSyncedError(OSError):
    """The file is in its place, but perhaps in the memory of the system only."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Output]:
    """Gives a file to write to, which takes the place of ``path`` when the block has ended without an exception.

    A local file is written under another name in the same folder, synced to the disk and renamed, and its folder is
    synced: whatever fails, and whenever the process is killed, ``path`` is the old file or the whole new one. What a
    killed process has left is removed by the next one that writes to the same path; where two write at a time the last
    one to end wins. A link is replaced, not followed. Missing folders are made. On other file systems of fsspec the
    file is written in a transaction, which for object stores is one upload.

    Raises:
        CheckpointWriteError: whatever has been raised in the block or by the file system, which is its cause. What was
            at ``path`` is there as it was, and nothing is left over. Other errors about checkpoints stay as they are.
    """
    fs, name = url_to_fs(os.fspath(path))
    local = isinstance(fs, LocalFileSystem)
    output: Output | None = None
    try:
        with _replacing_local(name) if local else _replacing_remote(fs, name) as output:
            yield output
            output.hand_on()
    except Exception as error:
        cause = error if output is None or output.error is None else output.error
        if isinstance(cause, CheckpointError) or not isinstance(cause, Exception):
            raise cause from cause.__cause__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause or repr(cause)
        kept = "" if isinstance(error, _NotSyncedError) else " What was there before is unchanged."
        raise CheckpointWriteError(f"{os.fspath(path)} could not be written: {reason}.{kept}") from cause


@contextmanager
def _replacing_local(path: str) -> Iterator[Output]:
    _refuse_folder(path, os.path.isdir(path) and not os.path.islink(path))
    operations, folder = _operations.OPERATIONS, os.path.dirname(path)
    changed = [folder, *_make_folder(folder)]
    with contextlib.suppress(OSError):
        _remove_leftovers(path)
    temporary, file = _create(path)
    try:
        output = Output(lambda data: operations.write(file, data))
        yield output
        operations.fsync(file)
        operations.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            operations.unlink(temporary)
        raise
    finally:
        with contextlib.suppress(OSError):  # what the disk had to say, it has said to fsync
            operations.close(file)
    for place in changed:
        _sync_folder(place)


def _refuse_folder(path: str, is_folder: bool) -> None:
    if is_folder:
        raise CheckpointWriteError(f"{path} is a folder, and this is to be a file. Give another path, or remove it.")


def _make_folder(folder: str) -> list[str]:
    """Makes what is missing of ``folder``; the folders in which something was made."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process makes it too; a file shows in what comes next
            _operations.OPERATIONS.mkdir(new)
    return [os.path.dirname(new) for new in missing]


def _create(path: str) -> tuple[str, int]:
    """A new file beside ``path``, and its descriptor; it is locked, as a sign that somebody writes to it."""
    operations = _operations.OPERATIONS
    while True:
        temporary = os.path.join(os.path.dirname(path), f".{_stem(path)}.{token_hex(4)}.partial")
        file = operations.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            _lock(file)
            if os.path.samestat(os.stat(temporary), os.fstat(file)):
                return temporary, file
        except (BlockingIOError, FileNotFoundError):
            operations.close(file)  # before it was locked, another writer has taken it for a leftover


def _remove_leftovers(path: str) -> None:
    operations, folder = _operations.OPERATIONS, os.path.dirname(path)
    ours = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9a-f]{{8}}\.partial")
    for name in filter(ours.fullmatch, os.listdir(folder)):
        leftover = os.path.join(folder, name)
        file = operations.open(leftover, os.O_RDWR)
        try:
            if _lock(file):
                operations.unlink(leftover)
        except BlockingIOError:
            pass  # another process is writing
        finally:
            operations.close(file)


def _stem(path: str) -> str:
    name = os.path.basename(path)
    return hashlib.sha256(os.fsencode(name)).hexdigest() if len(os.fsencode(name)) > _LONGEST_NAME else name


def _lock(file: int) -> bool:
    """Locks an open file; ``False`` where the file system has no locks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        _operations.OPERATIONS.lock(file)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _sync_folder(folder: str) -> None:
    operations = _operations.OPERATIONS
    try:
        file = operations.open(folder, os.O_RDONLY)
        try:
            operations.fsync(file)
        finally:
            operations.close(file)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            text = f"{error.strerror} in the sync of its folder, without which it may be gone after a loss of power"
            raise _NotSyncedError(error.errno, text) from error


@contextmanager
def _replacing_remote(fs: AbstractFileSystem, name: str) -> Iterator[Output]:
    _refuse_folder(name, fs.isdir(name))
    fs.makedirs(fs._parent(name), exist_ok=True)
    # without the transaction, leaving the block with an exception would complete the upload of half a file
    with fs.transaction, fs.open(name, "wb") as file:
        yield Output(file.write)
