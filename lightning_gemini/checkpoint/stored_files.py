"""The files of one save, read with the manifest's checksums beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from lightning_gemini.checkpoint.folder import Folder, InFile
from lightning_gemini.checkpoint.hashing import hash_range, read_parts
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME, Manifest, Piece
from lightning_gemini.checkpoint.tensor_file import header_metadata
from lightning_gemini.core.errors import CheckpointError, CorruptCheckpointError

_REMEDY = "Use another checkpoint."


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """What the system raises while ``where`` is read is a :class:`CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{where} could not be read: {error}") from error


class StoredFiles:
    """The files that ``manifest`` lists, in ``folder``. One of them is open at a time."""

    def __init__(self, folder: Folder, manifest: Manifest, raw_manifest: bytes) -> None:
        self._folder = folder
        self._manifest = manifest
        self._raw = raw_manifest
        self._open: InFile | None = None
        self._open_name = ""

    def check(self, name: str) -> None:
        """Compares a file's length, and its header where it has one, with the manifest.

        Raises:
            CorruptCheckpointError: it is missing, of another save, longer or shorter, or its header is damaged.
        """
        file, where = self._manifest.files[name], self._where(name)
        size = self._size(name)
        if size is None:
            raise CorruptCheckpointError(self._missing(name))
        if file.header is not None:
            header = bytearray(min(file.header, size))
            found = self._hash_into(name, memoryview(header), 0)
            if found != file.xxh3:
                self._refuse_other(where, header_metadata(bytes(header)))
            if found != file.xxh3 and size == file.nbytes:
                raise CorruptCheckpointError(f"{where} is damaged in its header: {_differs(found, file.xxh3)}")
        if size != file.nbytes:
            how = "truncated" if size < file.nbytes else "written to"
            raise CorruptCheckpointError(f"{where} has {size} bytes, expected {file.nbytes}: it was {how}. {_REMEDY}")

    def read(self, name: str) -> bytes:
        """A whole file without a header.

        Raises:
            CorruptCheckpointError: it is damaged.
        """
        data = bytearray(self._manifest.files[name].nbytes)
        found = self._hash_into(name, memoryview(data), 0)
        self._compare(found, self._manifest.files[name].xxh3, name)
        return bytes(data)

    def read_piece(self, fqn: str, piece: Piece, target: memoryview) -> None:
        """Fills ``target`` with the bytes of a piece of the tensor ``fqn``.

        Raises:
            CorruptCheckpointError: they are damaged; ``target`` is filled all the same.
        """
        self.read_parts(fqn, piece, [(0, target)])

    def read_parts(self, fqn: str, piece: Piece, parts: Iterable[tuple[int, memoryview]]) -> None:
        """Reads all bytes of a piece of the tensor ``fqn``, and keeps some: ``parts`` of it, first byte and target.

        Raises:
            CorruptCheckpointError: bytes of the piece are damaged, kept or not; the targets are filled all the same.
        """
        found = self._hash_parts(piece.file, piece.start, piece.nbytes, parts)
        self._compare(found, piece.xxh3, piece.file, fqn)

    def damages(self, name: str, progress: Callable[[int], None]) -> Iterator[CorruptCheckpointError]:
        """Reads every byte of a file; ``progress`` is told how many, block by block."""
        file = self._manifest.files[name]
        try:
            self.check(name)
        except CorruptCheckpointError as error:
            yield error
            if self._size(name) != file.nbytes:
                return
        parts = [("", 0, file.nbytes, file.xxh3)]
        if file.header is not None:
            progress(file.header)
            tensors = self._manifest.tensors.items()
            parts = [(fqn, p.start, p.nbytes, p.xxh3) for fqn, t in tensors for p in t.pieces if p.file == name]
        for fqn, start, nbytes, expected in sorted(parts, key=lambda part: part[1]):
            try:
                with readable(self._where(name)):
                    found = hash_range(self._opened(name), start, nbytes, progress)
                self._compare(found, expected, name, fqn)
            except EOFError:
                yield CorruptCheckpointError(f"{self._where(name)} has become shorter while it was read. {_REMEDY}")
                return
            except CorruptCheckpointError as error:
                yield error

    def close(self) -> None:
        """Closes the file that was read last; reading opens it again."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _size(self, name: str) -> int | None:
        with readable(self._where(name)):
            return self._folder.size(self._path(name))

    def _opened(self, name: str) -> InFile:
        if self._open is None or self._open_name != name:
            self.close()
            try:
                self._open, self._open_name = self._folder.open(self._path(name)), name
            except FileNotFoundError:
                raise CorruptCheckpointError(self._missing(name)) from None
        return self._open

    def _hash_into(self, name: str, target: memoryview, start: int) -> str:
        return self._hash_parts(name, start, len(target), [(0, target)])

    def _hash_parts(self, name: str, start: int, nbytes: int, parts: Iterable[tuple[int, memoryview]]) -> str:
        try:
            with readable(self._where(name)):
                return read_parts(self._opened(name), start, nbytes, parts)
        except EOFError:
            raise CorruptCheckpointError(f"{self._where(name)} is shorter than it was. {_REMEDY}") from None

    def _compare(self, found: str, expected: str, name: str, fqn: str = "") -> None:
        if found != expected:
            part = f" in the tensor {fqn!r}" if fqn else ""
            raise CorruptCheckpointError(f"{self._where(name)} is damaged{part}: {_differs(found, expected)}")

    def _refuse_other(self, where: str, metadata: dict[str, str]) -> None:
        """Raises if a header that is not the expected one says that it is of another save or rank."""
        found = metadata.get("save_id", self._manifest.save_id)
        if found != self._manifest.save_id:
            raise CorruptCheckpointError(
                f"{where} is of the save {found}, and the checkpoint of the save {self._manifest.save_id}: files of "
                f"two saves were mixed. {_REMEDY}"
            )

    def _missing(self, name: str) -> str:
        try:
            overwritten = self._folder.read(MANIFEST_NAME) != self._raw
        except OSError:
            overwritten = False
        if overwritten:
            return f"{self._where(name)} is missing: the checkpoint has been overwritten or removed. Load it again."
        return f"{self._where(name)} is missing. {_REMEDY}"

    def _path(self, name: str) -> str:
        return f"{self._manifest.save_id}/{name}"

    def _where(self, name: str) -> str:
        return self._folder.path(self._path(name))


def _differs(found: str, expected: str) -> str:
    return f"its checksum is {found}, expected {expected}. {_REMEDY}"
