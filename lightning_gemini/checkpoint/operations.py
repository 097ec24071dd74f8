"""The operations on files that a save and a removal consist of, one method each.

Everything that changes a local disk goes through one object, so that a test can fail or kill at each operation.
"""

from __future__ import annotations

import fcntl
import os
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

_OPEN_FILES = 0o666


class Operations:
    """The operating system's own; each method raises what :mod:`os` raises."""

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, _OPEN_FILES)

    def write(self, fd: int, data: Buffer) -> int:
        """Writes a part of ``data``, most often all, and returns how many bytes it was."""
        return os.write(fd, data)

    def truncate(self, fd: int) -> None:
        os.ftruncate(fd, 0)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def lock(self, fd: int) -> None:
        """Takes the advisory lock of an open file or raises :class:`BlockingIOError`; its end is the file's closing."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)


#: What every local folder uses; a test puts its own here.
OPERATIONS = Operations()
