"""The folder of a checkpoint in an object store or on another machine, through fsspec.

There a file appears whole when it is closed, nothing can be renamed in one step or locked, and there are no folders
to make: a plain put of the manifest is the commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from lightning_gemini.checkpoint.folder import Folder, InFile, OutFile
from lightning_gemini.checkpoint.operations import Buffer


class RemoteFolder(Folder):
    """``path`` on an fsspec file system."""

    def __init__(self, url: str, system: Any, path: str) -> None:
        self.where = url
        self._system = system
        self._path = path.rstrip("/")

    def is_folder(self) -> bool | None:
        self._system.invalidate_cache()
        if self._system.isdir(self._path):
            return True
        return False if self._system.exists(self._path) else None

    def is_link(self) -> bool:
        return False

    def names(self, name: str = "") -> list[str]:
        self._system.invalidate_cache()
        try:
            found = self._system.ls(self._full(name), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def size(self, name: str) -> int | None:
        self._system.invalidate_cache()
        try:
            return int(self._system.info(self._full(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        self._system.invalidate_cache()
        try:
            return bytes(self._system.cat_file(self._full(name)))
        except FileNotFoundError:
            return None

    def open(self, name: str) -> InFile:
        return _RemoteIn(self._system.open(self._full(name), "rb"))

    def make(self, name: str = "") -> None:
        self._system.makedirs(self._full(name), exist_ok=True)

    def create(self, name: str) -> OutFile:
        return _RemoteOut(self._system.open(self._full(name), "wb"))

    def sync(self, name: str = "") -> None:
        pass

    def replace(self, name: str, data: bytes, temporary: str, last_look: Callable[[], None]) -> None:
        last_look()
        self._system.pipe_file(self._full(name), data)

    def remove_file(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._full(name))

    def remove_folder(self, name: str = "") -> None:
        for file in self.names(name) if name else []:
            self.remove_file(f"{name}/{file}")
        # some stores have folders of their own, in others they are gone with the last file
        if self._system.isdir(self._full(name)):
            self._system.rmdir(self._full(name))

    def remove_link(self) -> None:
        raise NotADirectoryError(f"{self.where} is no link")

    def lock(self, purpose: str) -> bool:
        return False

    def unlock(self) -> None:
        pass

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path


class _RemoteOut(OutFile):
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Buffer) -> None:
        self._file.write(data)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class _RemoteIn(InFile):
    def __init__(self, file: Any) -> None:
        self._file = file

    def read_into(self, target: memoryview, start: int) -> None:
        self._file.seek(start)
        while target:
            data = self._file.read(len(target))
            if not data:
                raise EOFError
            target[: len(data)] = data
            target = target[len(data) :]

    def close(self) -> None:
        self._file.close()
