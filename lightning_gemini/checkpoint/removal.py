"""Removes a checkpoint: first the manifest, so that what a broken-off removal leaves is none any more."""

from __future__ import annotations

import contextlib
from os import PathLike

from lightning_gemini.checkpoint.folder import Folder
from lightning_gemini.checkpoint.kinds import why_not_sharded
from lightning_gemini.checkpoint.location import open_folder
from lightning_gemini.checkpoint.lock import LOCK_NAME
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME, decode_manifest
from lightning_gemini.checkpoint.sweep import Sweep, is_ours
from lightning_gemini.core.errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    NotACheckpointError,
)


def remove(path: str | PathLike[str]) -> None:
    """Removes the checkpoint at ``path``, and the folder if nothing else is in it. One process calls it.

    What a killed save or removal has left is removed too, and so is a damaged checkpoint. Files that no save has made
    stay. Of a symbolic link only the link goes.

    Raises:
        NotACheckpointError: nothing there is a checkpoint of this package, or was one; nothing is touched.
        CheckpointError: a save is at work there, or files cannot be removed.
    """
    folder = open_folder(path)
    try:
        _refuse_others(folder)
        if folder.is_link():
            folder.remove_link()
            return
        folder.lock("removing the checkpoint")
        try:
            folder.remove_file(MANIFEST_NAME)
            # the manifest must not be back after a loss of power when its files are gone
            folder.sync()
            Sweep(folder, alone=True).remove([name for name in folder.names() if is_ours(name)])
        finally:
            folder.unlock()
        if not folder.names():
            with contextlib.suppress(FileNotFoundError):
                folder.remove_folder()
    except OSError as error:
        raise CheckpointError(f"{folder.where} could not be removed: {error}") from error


def _refuse_others(folder: Folder) -> None:
    manifest = folder.read(MANIFEST_NAME) if folder.is_folder() else None
    if manifest is not None:
        with contextlib.suppress(CorruptCheckpointError, IncompatibleCheckpointError):
            decode_manifest(manifest, folder.path(MANIFEST_NAME))
    elif not folder.is_folder() or not any(is_ours(name) or name == LOCK_NAME for name in folder.names()):
        raise NotACheckpointError(f"{why_not_sharded(folder.where)} Nothing has been removed.")
