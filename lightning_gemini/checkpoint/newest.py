"""The newest checkpoint of a folder that is whole, to go on from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_gemini.checkpoint.full_file import verify_full
from lightning_gemini.checkpoint.kinds import Kind, is_unfinished, recognise, walk
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME, is_save_id
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.core.errors import CheckpointError, CorruptCheckpointError, NotACheckpointError

SUFFIX = ".ckpt"


def newest_checkpoint(folder: str | os.PathLike[str], check: Callable[[str], None] | None = None) -> str | None:
    """The newest checkpoint in ``folder`` whose every byte is as it was written, for ``trainer.fit(ckpt_path=...)``.

    Looks at sharded checkpoints and at files that end in ``.ckpt``, also in the folders below, and verifies them from
    the newest on, by the time at which they were saved, until one is whole. Links are followed; a checkpoint that
    several lead to is looked at once. Warns of every newer one that is broken, and why.

    Args:
        folder: of a run, local or of any file system that fsspec knows.
        check: raises :class:`CheckpointError` for a broken checkpoint, by default :func:`verify`. Ranks that come here
            together can share the work with its ``share`` and then have to agree.

    Returns:
        its path; ``None`` if there has been no checkpoint yet. It warns of a first save that was killed.

    Raises:
        CorruptCheckpointError: there are checkpoints, but none is whole; says why not. Whether to train from the
            beginning is for a person to decide.
        CheckpointError: the folder cannot be read.
    """
    fs, name = url_to_fs(os.fspath(folder))
    broken, nothing_lost = [], True
    for candidate in sorted(_candidates(fs, name), key=lambda one: (one.time, one.path), reverse=True):
        try:
            (check or verify)(candidate.path)
        except CheckpointError as error:
            broken.append(str(error))
            nothing_lost &= candidate.is_unfinished
            continue
        if broken:
            warnings.warn(
                f"{candidate.path} is the newest checkpoint that is whole; newer ones are broken:\n{_lines(broken)}",
                stacklevel=2,
            )
        return candidate.path
    if not nothing_lost:
        raise CorruptCheckpointError(
            f"there are checkpoints in {os.fspath(folder)}, but none that is whole:\n{_lines(broken)}\n"
            "To train from the beginning, give another folder or move them away."
        )
    if broken:
        warnings.warn(f"there is no checkpoint in {os.fspath(folder)} yet:\n{_lines(broken)}", stacklevel=2)
    return None


def verify(
    path: str | os.PathLike[str], share: tuple[int, int] = (0, 1), progress: Callable[[int], None] = lambda _: None
) -> Kind:
    """Compares every byte of a checkpoint of either kind with its checksums.

    Args:
        share: rank and number of ranks, to look at this rank's part only.
        progress: called with numbers of bytes that have been read.

    Returns:
        its kind.

    Raises:
        NotACheckpointError: there is none.
        CorruptCheckpointError: it is damaged.
        IncompatibleCheckpointError: a newer version of this package wrote it.
        CheckpointError: it cannot be read.
    """
    kind = recognise(path)
    if kind is Kind.FULL:
        verify_full(path, share, progress)
        return kind
    reader = CheckpointReader(path, check=False)  # which is a part of what comes
    files = reader.manifest.files
    rank, ranks = share
    reader.verify(sorted(files, key=lambda name: files[name].nbytes)[rank::ranks], progress)
    return kind


@dataclass(frozen=True)
class _Candidate:
    path: str
    time: datetime
    is_unfinished: bool


def _candidates(fs: AbstractFileSystem, folder: str) -> Iterator[_Candidate]:
    if not fs.exists(folder):
        return
    if not fs.isdir(folder):
        raise NotACheckpointError(f"{folder} is a file, expected the folder of a run.")
    seen = set()
    for path, inside in walk(fs, folder):
        names = list(inside or ())
        if (inside is None and path.endswith(SUFFIX)) or MANIFEST_NAME in names or is_unfinished(names):
            real = os.path.realpath(path) if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
            if real not in seen:
                seen.add(real)
                yield _Candidate(real, _time(fs, path, names), is_unfinished(names))


def _time(fs: AbstractFileSystem, path: str, names: Sequence[str]) -> datetime:
    """When a checkpoint was saved: sharded ones say so in the name of a save, files in their metadata."""
    saves = [name for name in names if is_save_id(name)]
    if saves:
        return datetime.strptime(max(saves).partition("-")[0], "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC)
    try:
        time: datetime = fs.modified(path)
    except (OSError, NotImplementedError, KeyError):  # a link to nothing; a file system that does not say
        return datetime.fromtimestamp(0, UTC)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _lines(reasons: Sequence[str]) -> str:
    return "\n".join(f"  - {reason}" for reason in reasons)
