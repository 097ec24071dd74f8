"""A lock on a folder, held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

from lightning_gemini.checkpoint.operations import Operations
from lightning_gemini.core.errors import CheckpointError

LOCK_NAME = ".lock"

_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_LONGEST = 4096


def this_process() -> dict[str, Any]:
    """Host and process id, for messages to whoever finds a lock or a manifest."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


class FolderLock:
    """An flock on the file ``.lock`` in ``folder``, which is there as long as the lock is held.

    The kernel drops it with the process, so a killed holder leaves a file that nobody holds. Some network file systems
    have no such lock, or one for each host alone: then there is none, and writers find each other at the commit.
    """

    def __init__(self, folder: str, operations: Operations) -> None:
        self._path = os.path.join(folder, LOCK_NAME)
        self._operations = operations
        self._fd: int | None = None

    def acquire(self, purpose: str) -> bool:
        """Takes the lock for ``purpose``, which others read in their errors; ``False`` where there are no locks.

        Raises:
            CheckpointError: another process holds it; it is named.
            OSError: the file cannot be made.
        """
        locked = False
        while self._fd is None:
            fd = self._operations.open(self._path, os.O_RDWR | os.O_CREAT)
            try:
                locked = self._take(fd)
                # the holder before removed the file as it let go: a lock on that one protects nothing
                if self._is_current(fd):
                    self._sign(fd, purpose, locked)
                    self._fd = fd
            finally:
                if self._fd is None:
                    self._operations.close(fd)
        return locked

    def release(self) -> None:
        """Lets go; nothing happens where the lock is not held, and what fails here keeps nobody from going on."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            self._operations.unlink(self._path)
        with contextlib.suppress(OSError):
            # a child that was forked meanwhile has the open file too, and would keep the lock
            self._operations.unlock(fd)
        with contextlib.suppress(OSError):
            self._operations.close(fd)

    def _take(self, fd: int) -> bool:
        try:
            self._operations.lock(fd)
        except BlockingIOError as error:
            raise CheckpointError(_held(os.path.dirname(self._path), _holder(fd))) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return False
        return True

    def _sign(self, fd: int, purpose: str, locked: bool) -> None:
        try:
            self._operations.truncate(fd)
            self._operations.write(fd, json.dumps({**this_process(), "for": purpose}).encode())
        except OSError:
            if locked:
                with contextlib.suppress(OSError):
                    self._operations.unlink(self._path)
            raise

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False


def _held(folder: str, holder: Mapping[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "another process"
    purpose = f" ({holder['for']})" if "for" in holder else ""
    if _is_gone(holder):
        return (
            f"{who}, which is gone, was at work in {folder}{purpose}, and a process that it has started is still "
            "there. End that one, and save again."
        )
    return (
        f"{who} is at work in {folder}{purpose}. Two writers must not share a path: give each run a folder of its own, "
        "or wait until the other is done."
    )


def _is_gone(holder: Mapping[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _holder(fd: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(fd, _LONGEST, 0))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}
