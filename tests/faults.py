"""Operations on files that fail, kill their process, or remember what a loss of power would leave."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_gemini.checkpoint import operations
from lightning_gemini.checkpoint.operations import Operations

NAMES = [name for name in vars(Operations) if not name.startswith("_")]


class Watched(Operations):
    """Notes every operation, in the order in which they begin."""

    def __init__(self) -> None:
        self.log: list[tuple[str, tuple[Any, ...]]] = []

    def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
        """Does operation number ``index``."""
        return getattr(Operations, name)(self, *args)


def _watched(name: str) -> Any:
    def operation(self: Watched, *args: Any) -> Any:
        self.log.append((name, args))
        return self.at(len(self.log) - 1, name, args)

    return operation


for _name in NAMES:
    setattr(Watched, _name, _watched(_name))


class Failing(Watched):
    """Operation number ``number`` fails with ``errno``; with ``lasting`` all that follow do too."""

    def __init__(self, number: int, errno: int, lasting: bool = False) -> None:
        super().__init__()
        self.number, self.errno, self.lasting = number, errno, lasting

    def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
        if index != self.number and not (self.lasting and index > self.number):
            return super().at(index, name, args)
        if name == "write":
            Operations.write(self, args[0], memoryview(args[1])[: len(args[1]) // 2])
        elif name in ("close", "unlock"):
            super().at(index, name, args)  # the file is closed all the same
        raise OSError(self.errno, os.strerror(self.errno), args[0] if isinstance(args[0], str) else None)


class Killing(Watched):
    """The process is killed at operation number ``number``: before it, or after the half of what it writes."""

    def __init__(self, number: int, half: bool) -> None:
        super().__init__()
        self.number, self.half = number, half

    def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
        if index == self.number:
            if self.half and name == "write":
                Operations.write(self, args[0], memoryview(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().at(index, name, args)


@contextlib.contextmanager
def installed(replacement: Operations) -> Iterator[None]:
    """Local folders that are opened inside use ``replacement``."""
    before, operations.OPERATIONS = operations.OPERATIONS, replacement
    try:
        yield
    finally:
        operations.OPERATIONS = before


class _File:
    def __init__(self, content: bytes = b"") -> None:
        self.content, self.safe = bytearray(content), bytes(content)


class _Folder:
    def __init__(self) -> None:
        self.entries: dict[str, _File | _Folder] = {}
        self.safe: dict[str, _File | _Folder] = {}


class Disk(Watched):
    """Does every operation, and keeps what a disk is sure to have: nothing that was not synchronised.

    Of a file that is its content at its last fsync, of a folder its entries at the last fsync of the folder. What came
    later may or may not be there after a loss of power, each change by itself.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self._tree = self._scan(root)
        self._open: dict[int, _File | _Folder] = {}

    def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
        result = super().at(index, name, args)
        getattr(self, f"_after_{name}", lambda *_: None)(result, *args)
        return result

    def after_loss(self, target: Path, rng: random.Random) -> None:
        """Writes what may be left into the new folder ``target``."""
        self._write(self._tree, target, rng)

    def _write(self, folder: _Folder, target: Path, rng: random.Random) -> None:
        target.mkdir()
        left = dict(folder.safe)
        for name in sorted(folder.safe.keys() | folder.entries.keys()):
            if folder.safe.get(name) is not folder.entries.get(name) and rng.random() < 0.5:
                left.pop(name, None)
                if name in folder.entries:
                    left[name] = folder.entries[name]
        for name, node in left.items():
            if isinstance(node, _Folder):
                self._write(node, target / name, rng)
            else:
                unsure = [node.safe, bytes(node.content), bytes(len(node.content)), bytes(node.content[:7])]
                (target / name).write_bytes(node.safe if bytes(node.content) == node.safe else rng.choice(unsure))

    def _scan(self, path: Path) -> _Folder:
        folder = _Folder()
        for child in path.iterdir():
            folder.entries[child.name] = self._scan(child) if child.is_dir() else _File(child.read_bytes())
        folder.safe = dict(folder.entries)
        return folder

    def _find(self, path: str) -> tuple[_Folder, str]:
        *above, name = Path(path).relative_to(self._root).parts
        folder = self._tree
        for part in above:
            folder = folder.entries[part]  # type: ignore[assignment]
        return folder, name

    def _after_open(self, fd: int, path: str, flags: int) -> None:
        if Path(path) == self._root:
            self._open[fd] = self._tree
            return
        folder, name = self._find(path)
        if name not in folder.entries:
            folder.entries[name] = _File()
        self._open[fd] = folder.entries[name]

    def _after_write(self, count: int, fd: int, data: bytes) -> None:
        self._open[fd].content += bytes(data[:count])  # type: ignore[union-attr]

    def _after_truncate(self, _: None, fd: int) -> None:
        self._open[fd].content.clear()  # type: ignore[union-attr]

    def _after_fsync(self, _: None, fd: int) -> None:
        node = self._open[fd]
        if isinstance(node, _Folder):
            node.safe = dict(node.entries)
        else:
            node.safe = bytes(node.content)

    def _after_mkdir(self, _: None, path: str) -> None:
        folder, name = self._find(path)
        folder.entries[name] = _Folder()

    def _after_replace(self, _: None, source: str, target: str) -> None:
        (from_folder, from_name), (to_folder, to_name) = self._find(source), self._find(target)
        to_folder.entries[to_name] = from_folder.entries.pop(from_name)

    def _after_unlink(self, _: None, path: str) -> None:
        folder, name = self._find(path)
        del folder.entries[name]

    _after_rmdir = _after_unlink
