"""The subcommands `lightning-gemini verify` and `consolidate`: what is in a checkpoint, and one file made of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from fsspec.core import url_to_fs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lightning_gemini.checkpoint.consolidate import consolidate as write_one_file
from lightning_gemini.checkpoint.consolidate import open_sharded
from lightning_gemini.checkpoint.full_file import read_full, verify_full
from lightning_gemini.checkpoint.kinds import Kind, recognise
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.checkpoint.summary import describe_full, describe_sharded
from lightning_gemini.core.errors import CheckpointError, CorruptCheckpointError, NotACheckpointError
from lightning_gemini.core.memory import format_bytes


def verify(path: str) -> None:
    """Prints what is in the checkpoint at ``path``, when every byte of it has been compared with its checksums.

    Exits with code 1 and one line on stderr if it is damaged, or none.

    Args:
        path: a folder or a file, local or of any file system that fsspec knows.
    """
    with _errors("verify"):
        print(_verify_full(path) if recognise(path) is Kind.FULL else _verify_sharded(path))


def consolidate(folder: str, out: str, weights_only: bool) -> None:
    """Writes the sharded checkpoint in ``folder`` as one ordinary Lightning file ``out``.

    Exits with code 1 and one line on stderr if that is not possible; a file that was at ``out`` stays then.

    Args:
        weights_only: whether only plain data is unpickled of what callbacks and hooks have added.
    """
    with _errors("consolidate"):
        reader = open_sharded(folder)
        with _bar("consolidating", sum(tensor.nbytes for tensor in reader.manifest.tensors.values())) as advance:
            write_one_file(reader, out, weights_only, advance)
        fs, name = url_to_fs(out)
        print(f"{out}: one file of {format_bytes(fs.size(name))}")
        if left_out := reader.manifest.about.get("left_out"):
            print(f"{len(left_out)} frozen parameters are not in it, as in the checkpoint (save_frozen=False)")


def _verify_sharded(path: str) -> str:
    reader = CheckpointReader(path)
    with _bar("verifying", reader.manifest.nbytes) as advance:
        reader.verify(progress=advance)
    return f"{path}: every byte is as it was written\n{describe_sharded(reader.manifest)}"


def _verify_full(path: str) -> str:
    fs, name = url_to_fs(path)
    nbytes, time = fs.size(name), None
    with suppress(NotImplementedError, KeyError):
        time = fs.modified(name)
    with _bar("verifying", nbytes) as advance:
        checked = verify_full(path, progress=advance)
    said = "all that is in it is as it was written" if checked else "there are no checksums in it to compare"
    return f"{path}: {said}\n{_describe_file(path, nbytes, time)}"


def _describe_file(path: str, nbytes: int, time: datetime | None) -> str:
    try:
        return describe_full(read_full(path, "meta", check=False), nbytes, time)
    except (CorruptCheckpointError, NotACheckpointError):
        raise
    except CheckpointError as error:
        return f"what it consists of cannot be told: {error}"


@contextmanager
def _errors(command: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, OSError) as error:
        sys.stdout.flush()  # what was printed stands before the error
        sys.exit(f"lightning-gemini {command}: {' '.join(str(error).split())}")


@contextmanager
def _bar(what: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr that is gone afterwards; none where stderr is no terminal."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=nbytes)
        yield lambda count: progress.advance(task, count)
