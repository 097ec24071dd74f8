"""A sharded checkpoint -> one ordinary Lightning file."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from lightning_gemini.checkpoint.kinds import Kind, recognise
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.checkpoint.streamed import stand_in, write_streamed
from lightning_gemini.checkpoint.whole import whole_checkpoint
from lightning_gemini.core.errors import CheckpointError, NotACheckpointError


def open_sharded(folder: str | os.PathLike[str]) -> CheckpointReader:
    """The sharded checkpoint in ``folder``.

    Raises:
        NotACheckpointError: there is none; says what was found.
        CorruptCheckpointError: it is damaged.
        CheckpointError: it cannot be read.
    """
    if recognise(folder) is Kind.FULL:
        raise NotACheckpointError(f"{os.fspath(folder)} is one ordinary file already, expected a sharded checkpoint.")
    return CheckpointReader(folder)


def consolidate(
    reader: CheckpointReader,
    out: str | os.PathLike[str],
    weights_only: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a checkpoint as one file, from which plain Lightning loads and goes on training.

    On one process, with one tensor in memory at a time; each is compared with its checksums as it is read. Weights and
    optimizer states keep the dtypes in which they were saved: fp32 in all modes of precision with fp32 masters.

    Args:
        out: the file, local or of any file system that fsspec knows; it is there whole or not at all.
        weights_only: whether only plain data is unpickled of what callbacks and hooks have added.
        progress: called with numbers of bytes of tensors that have been written.

    Raises:
        CorruptCheckpointError: the checkpoint is damaged; the file that was at ``out`` stays.
        CheckpointError: it cannot be read, or holds classes that ``weights_only`` does not allow.
        CheckpointWriteError: the file could not be written.
    """
    if os.path.abspath(out).startswith(os.path.join(os.path.abspath(reader.where), "")):
        raise CheckpointError(
            f"{os.fspath(out)} is inside the checkpoint that it is made of. Give a path outside of it."
        )
    names: dict[int, str] = {}

    def empty(name: str) -> Tensor:
        saved = reader.manifest.tensors[name]
        tensor = stand_in(saved.shape, saved.dtype)
        names[id(tensor)] = name
        return tensor

    checkpoint = whole_checkpoint(reader, weights_only, empty)
    write_streamed(checkpoint, out, lambda tensor: reader.tensor(names[id(tensor)]), progress)
