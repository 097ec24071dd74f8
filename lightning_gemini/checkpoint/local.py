"""The folder of a checkpoint on a file system of this machine, made to last: see the note in ``writer``."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable

from lightning_gemini.checkpoint import operations as _operations
from lightning_gemini.checkpoint.folder import Folder, InFile, OutFile
from lightning_gemini.checkpoint.lock import FolderLock
from lightning_gemini.checkpoint.operations import Buffer, Operations

_SMALL = 2**16
_TOGETHER = 2**20


class LocalFolder(Folder):
    """A folder of a file system that the operating system has mounted."""

    def __init__(self, path: str) -> None:
        self.where = path
        self._path = os.path.abspath(path)
        self._operations = _operations.OPERATIONS
        self._lock = FolderLock(self._path, self._operations)

    def is_folder(self) -> bool | None:
        try:
            return stat.S_ISDIR(os.stat(self._path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def is_link(self) -> bool:
        return os.path.islink(self._path)

    def names(self, name: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self._full(name)))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self._full(name)).st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        try:
            with open(self._full(name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> InFile:
        return _LocalIn(self._full(name))

    def make(self, name: str = "") -> None:
        if name:
            self._operations.mkdir(self._full(name))
            return
        missing = []
        above = self._path
        while not os.path.isdir(above):
            missing.append(above)
            above = os.path.dirname(above)
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another run may make the same parents
                self._operations.mkdir(folder)
            self._sync(os.path.dirname(folder))
        if not missing:
            # a save that was killed may have made the folder and not come to this; a parent that may not be read stays
            with contextlib.suppress(PermissionError):
                self._sync(os.path.dirname(self._path))

    def create(self, name: str) -> OutFile:
        return _LocalOut(self._full(name), self._operations)

    def sync(self, name: str = "") -> None:
        self._sync(self._full(name))

    def replace(self, name: str, data: bytes, temporary: str, last_look: Callable[[], None]) -> None:
        with self.create(temporary) as file:
            file.write(data)
            file.sync()
        last_look()
        self._operations.replace(self._full(temporary), self._full(name))

    def remove_file(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._operations.unlink(self._full(name))

    def remove_folder(self, name: str = "") -> None:
        if not name:
            self._operations.rmdir(self._path)
            self._sync(os.path.dirname(self._path))
            return
        for file in self.names(name):
            self._operations.unlink(self._full(f"{name}/{file}"))
        with contextlib.suppress(FileNotFoundError):
            self._operations.rmdir(self._full(name))

    def remove_link(self) -> None:
        self._operations.unlink(self._path)

    def lock(self, purpose: str) -> bool:
        return self._lock.acquire(purpose)

    def unlock(self) -> None:
        self._lock.release()

    def _full(self, name: str) -> str:
        return os.path.join(self._path, name) if name else self._path

    def _sync(self, path: str) -> None:
        fd = self._operations.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._operations.fsync(fd)
        finally:
            self._operations.close(fd)


class _LocalOut(OutFile):
    def __init__(self, path: str, operations: Operations) -> None:
        self._operations = operations
        self._fd = operations.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._small = bytearray()

    def write(self, data: Buffer) -> None:
        if len(data) < _SMALL:
            self._small += data
            if len(self._small) >= _TOGETHER:
                self._flush()
            return
        self._flush()
        self._write(memoryview(data))

    def sync(self) -> None:
        self._flush()
        self._operations.fsync(self._fd)

    def close(self) -> None:
        self._operations.close(self._fd)

    def _flush(self) -> None:
        small, self._small = self._small, bytearray()
        self._write(memoryview(small))

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._operations.write(self._fd, data) :]


class _LocalIn(InFile):
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, target: memoryview, start: int) -> None:
        while target:
            count = os.preadv(self._fd, [target], start)
            if not count:
                raise EOFError
            target, start = target[count:], start + count

    def close(self) -> None:
        os.close(self._fd)
