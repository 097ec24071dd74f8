"""Which checkpoint a run goes on from when nobody has named a certain one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection
from os import PathLike
from typing import Any

from fsspec.core import url_to_fs

from lightning_gemini.checkpoint.kinds import recognise
from lightning_gemini.checkpoint.newest import newest_checkpoint, verify
from lightning_gemini.core.errors import CheckpointError, NotACheckpointError

Exchange = Callable[[Any], list[Any]]


def choose(path: str | PathLike[str], last: Collection[object], rank: int, exchange: Exchange) -> str:
    """The checkpoint that ``path`` stands for; all ranks together, and each looks at a part of the bytes.

    A checkpoint that is named is taken as it is. One that a callback has found to be the last, and the newest one in
    the folder of a run, have to be whole; if they are not, the newest whole one in that folder is taken instead, with
    a warning.

    Args:
        last: the paths that callbacks have for the last checkpoint.
        rank: this one's.
        exchange: returns every rank's value.

    Raises:
        NotACheckpointError: there is no checkpoint at ``path`` or below.
        CorruptCheckpointError: there is none that is whole.
    """
    where = os.fspath(path)

    def check(candidate: str) -> None:
        failed: CheckpointError | None = None
        ranks = len(exchange(None))
        try:
            verify(candidate, share=(rank, ranks))
        except CheckpointError as error:
            failed = error
        for other in exchange(failed):
            if other is not None:
                raise other

    if where in {os.fspath(one) for one in last if isinstance(one, (str, PathLike))}:
        try:
            check(where)
        except CheckpointError as error:  # a link may lead to one whose save in the background was killed
            found = newest_checkpoint(os.path.dirname(where), check)
            if found is None:
                raise
            if rank == 0:
                warnings.warn(f"the last checkpoint is broken, going on from {found} instead: {error}", stacklevel=2)
            return found
        return where
    try:
        recognise(where)
    except NotACheckpointError:
        fs, name = url_to_fs(where)
        found = newest_checkpoint(where, check) if fs.isdir(name) else None
        if found is None:
            raise
        return found
    return where
