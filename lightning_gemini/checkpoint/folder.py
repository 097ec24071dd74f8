"""The folder of a checkpoint: the only place where saves, loads and removals touch files.

Names are relative to the folder, with ``/`` between a save's folder and a file in it; the empty name is the folder.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lightning_gemini.checkpoint.operations import Buffer


class OutFile(ABC):
    """A new file, written from its beginning to its end; a context manager that closes it."""

    @abstractmethod
    def write(self, data: Buffer) -> None:
        """Appends ``data``; large pieces go to the system as they are, small ones together."""

    @abstractmethod
    def sync(self) -> None:
        """Brings all that was written to the disk."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(OSError):
                self.close()


class InFile(ABC):
    """A file that is read; a context manager that closes it."""

    @abstractmethod
    def read_into(self, target: memoryview, start: int) -> None:
        """Fills ``target`` with the bytes from ``start`` on.

        Raises:
            EOFError: the file ends before.
        """

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Folder(ABC):
    """Operations on a checkpoint's folder; every one of them may raise :class:`OSError`.

    Attributes:
        where: the path as the user gave it, for messages.
    """

    where: str

    def path(self, name: str) -> str:
        """``name`` in this folder, for messages."""
        return f"{self.where.rstrip('/')}/{name}" if name else self.where

    @abstractmethod
    def is_folder(self) -> bool | None:
        """Whether the path is a folder; ``None`` if nothing is there."""

    @abstractmethod
    def is_link(self) -> bool:
        """Whether the path is a symbolic link."""

    @abstractmethod
    def names(self, name: str = "") -> list[str]:
        """What lies in a folder, sorted; nothing if it is not there."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, ``None`` if it is not there."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A whole file, ``None`` if it is not there."""

    @abstractmethod
    def open(self, name: str) -> InFile: ...

    @abstractmethod
    def make(self, name: str = "") -> None:
        """Makes a folder; without a name this one and those above it, where they are missing."""

    @abstractmethod
    def create(self, name: str) -> OutFile:
        """Begins a file that must not be there yet."""

    @abstractmethod
    def sync(self, name: str = "") -> None:
        """Brings the entries of a folder, not the contents of its files, to the disk."""

    @abstractmethod
    def replace(self, name: str, data: bytes, temporary: str, last_look: Callable[[], None]) -> None:
        """Makes ``data`` the content of ``name`` in one step: before it the old content is there, after it the new.

        Args:
            temporary: a name in the same folder that nobody else uses.
            last_look: called immediately before that step, and may raise to prevent it.
        """

    @abstractmethod
    def remove_file(self, name: str) -> None:
        """Removes a file, if it is there."""

    @abstractmethod
    def remove_folder(self, name: str = "") -> None:
        """Removes a folder, if it is there; one with a name with the files in it, this one only if it is empty."""

    @abstractmethod
    def remove_link(self) -> None:
        """Removes the symbolic link that the path is."""

    @abstractmethod
    def lock(self, purpose: str) -> bool:
        """Keeps other writers away until :meth:`unlock`; returns whether it does, since not everywhere there are locks.

        Raises:
            CheckpointError: another process holds it; it is named.
        """

    @abstractmethod
    def unlock(self) -> None: ...
