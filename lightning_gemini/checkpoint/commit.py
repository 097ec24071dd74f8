"""Replaces the checkpoint at a path by a new one, in one step; what rank 0 does of a save.

NOTE: why a crash leaves the old checkpoint or the new one, whole.
A save writes files that nothing refers to yet, into a folder of its own, and only then replaces the manifest, in one
step. A killed process leaves the old manifest and its files, or the new manifest and its files. A machine that loses
power forgets what it was not made to keep, in any order; so before the manifest is replaced its own bytes, the bytes of
all files, their entries in the save's folder and that folder's entry in the path have been synchronised, and before the
files of the old save go, so has the replacement.
"""

from __future__ import annotations

import contextlib

from lightning_gemini.checkpoint.folder import Folder
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME, Manifest, decode_manifest
from lightning_gemini.checkpoint.sweep import Sweep
from lightning_gemini.core.errors import CheckpointError, CorruptCheckpointError, IncompatibleCheckpointError


class Commit:
    """The replacement of what is in ``folder`` by the save ``save_id``: begun, then finished or undone, then closed."""

    def __init__(self, folder: Folder, save_id: str) -> None:
        self._folder = folder
        self._save_id = save_id
        self._sweep = Sweep(folder, alone=False)
        self._before: bytes | None = None
        self._old_save_id = ""
        self._made = self._begun = self._committed = self._keep = False

    def begin(self) -> None:
        """Takes the lock, removes what killed saves have left and makes the save's folder.

        Raises:
            CheckpointError: another writer is at work there, or the path is a symbolic link.
            NotACheckpointError: another program's file is where the manifest would be.
            OSError: an operation failed; :class:`NotADirectoryError` if the path is a file.
        """
        folder = self._folder
        if folder.is_link():
            raise CheckpointError(
                f"{folder.where} is a symbolic link; a save through it would overwrite the checkpoint that it points "
                "to. Remove the link, or save elsewhere"
            )
        is_folder = folder.is_folder()
        if is_folder is False:
            raise NotADirectoryError(f"expected a folder for a sharded checkpoint, {folder.where} is a file")
        self._made = is_folder is None
        folder.make()
        self._sweep = Sweep(folder, alone=folder.lock(f"saving {self._save_id}"))
        self._before = folder.read(MANIFEST_NAME)
        if self._before is not None:
            self._old_save_id = _save_id_of(self._before, folder.path(MANIFEST_NAME))
        # of a damaged manifest nobody knows which files are its own: they stay until the new one is in place
        if self._before is None or self._old_save_id:
            self._sweep.leftovers(keep=self._old_save_id)
        self._begun = True
        folder.make(self._save_id)

    def finish(self, manifest: Manifest) -> None:
        """Puts ``manifest`` in the old one's place, when all its files are on the disk, and removes the old files.

        Raises:
            CheckpointError: files are missing, or another writer has been there; nothing has changed.
            OSError: an operation failed; nothing has changed, unless :meth:`undo` says otherwise.
        """
        data = manifest.encode()
        self._folder.sync()

        def last_look() -> None:
            self._check_unchanged()
            self._check_files(manifest)

        self._folder.replace(MANIFEST_NAME, data, self._temporary, last_look)
        self._committed = True
        try:
            self._folder.sync()
        except OSError:
            self._take_back()
            raise
        self._sweep.after(self._old_save_id, self._save_id)

    def undo(self) -> str:
        """Removes what the save has written, if nothing refers to it; says what is at the path now."""
        if not self._begun:
            return "Nothing there has been changed."
        try:
            found = self._folder.read(MANIFEST_NAME)
        except Exception:
            self._committed = True  # for all that is known
        else:
            # an interrupt may come between any two lines: what is there counts, not what was noted
            ours = found != self._before and self._save_id.encode() in (found or b"")
            self._committed = self._committed or ours
        if self._committed:
            return "The new checkpoint is in place, but may not survive a loss of power."
        if not self._keep:
            self._sweep.remove([self._temporary, self._save_id])
        if found != self._before:
            return "What is there is not of this run."
        return "There is no checkpoint." if found is None else "The checkpoint from before is in place."

    def close(self) -> None:
        """Lets other writers in, and removes the path if it was made for nothing."""
        self._folder.unlock()
        if self._made and not self._committed:
            with contextlib.suppress(Exception):
                self._folder.remove_folder()

    @property
    def _temporary(self) -> str:
        return f"{MANIFEST_NAME}.{self._save_id}"

    def _check_files(self, manifest: Manifest) -> None:
        """Looks whether rank 0 sees what all ranks have written."""
        for name, file in manifest.files.items():
            found = self._folder.size(f"{self._save_id}/{name}")
            if found != file.nbytes:
                raise CheckpointError(
                    f"rank 0 sees {'nothing' if found is None else f'{found} bytes'} of {name}, which has "
                    f"{file.nbytes} bytes. {must_share(self._folder.where)}"
                )

    def _check_unchanged(self) -> None:
        """Looks whether another writer has been here since this save began, where no lock keeps it away."""
        now = self._folder.read(MANIFEST_NAME)
        if now == self._before:
            return
        try:
            writer = decode_manifest(now or b"", "").writer
            who = f"process {writer['pid']} on {writer['host']}"
        except (CheckpointError, KeyError):
            who = "another process"
        raise CheckpointError(
            f"{who} has {'removed' if now is None else 'saved'} a checkpoint there since this save began. Two writers "
            "must not share a path: give each run a folder of its own."
        )

    def _take_back(self) -> None:
        """Puts the old manifest back, after the new one could not be brought to the disk."""
        with contextlib.suppress(OSError):
            if self._before is None:
                self._folder.remove_file(MANIFEST_NAME)
            else:
                self._folder.replace(MANIFEST_NAME, self._before, self._temporary, lambda: None)
            self._committed = False
            # the new manifest may be what is on the disk: only when it surely is not may its files go
            self._keep = True
            self._folder.sync()
            self._keep = False


def must_share(where: str) -> str:
    """For errors: what is wrong where a rank does not see what another one has written to ``where``."""
    return (
        f"All ranks have to share {where}, so a disk of each machine's own will not do, and no other run may save there"
    )


def _save_id_of(manifest: bytes, where: str) -> str:
    """The save that a manifest is of, empty if that cannot be told.

    Raises:
        NotACheckpointError: it is another program's file.
    """
    try:
        return decode_manifest(manifest, where).save_id
    except (CorruptCheckpointError, IncompatibleCheckpointError):
        return ""
