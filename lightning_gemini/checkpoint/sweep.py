"""Removes what saves leave behind: the files of the save before, and those of saves that were killed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from lightning_gemini.checkpoint.folder import Folder
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME, is_save_id

#: How old a leftover has to be where no lock tells whether its writer is still at work.
_SURELY_DEAD = timedelta(days=1)


def is_ours(name: str) -> bool:
    """Whether saves make entries of this name in a checkpoint's folder, beside the manifest and the lock."""
    return is_save_id(name) or _is_temporary(name)


class Sweep:
    """Removes entries of ``folder`` by their names; what nobody of ours would have made stays.

    Args:
        alone: whether a lock keeps other writers away. Without one, what may be another writer's stays for a day.
    """

    def __init__(self, folder: Folder, alone: bool) -> None:
        self._folder = folder
        self._alone = alone

    def leftovers(self, keep: str) -> None:
        """Removes all saves but ``keep``, whose manifest is in place; only warns where that fails."""
        try:
            found = [name for name in self._folder.names() if is_ours(name) and name != keep]
            found = [name for name in found if self._alone or _is_old(name)]
            if found:
                # the manifest may not have come to the disk yet, if its writer was killed; what is there then refers
                # to another save
                self._folder.sync()
        except Exception as error:
            self._warn([str(error)])
        else:
            self.remove(found)

    def after(self, old: str, new: str) -> None:
        """Removes the save ``old`` and all leftovers, after ``new`` has been committed; only warns where that fails."""
        if not self._alone and old:
            self.remove([old])
        self.leftovers(keep=new)

    def remove(self, names: Iterable[str]) -> None:
        """Removes the files and folders of these names, and warns of those that cannot be removed."""
        failures = []
        for name in names:
            try:
                if _is_temporary(name):
                    self._folder.remove_file(name)
                else:
                    self._folder.remove_folder(name)
            except Exception as error:
                failures.append(f"{name} ({error})")
        self._warn(failures)

    def _warn(self, failures: list[str]) -> None:
        if failures:
            warnings.warn(
                f"old files in {self._folder.where} could not be removed; the next save there tries again: "
                f"{', '.join(failures)}",
                stacklevel=2,
            )


def _is_temporary(name: str) -> bool:
    return name.startswith(f"{MANIFEST_NAME}.") and is_save_id(name.removeprefix(f"{MANIFEST_NAME}."))


def _is_old(name: str) -> bool:
    made = datetime.strptime(name.removeprefix(f"{MANIFEST_NAME}.").partition("-")[0], "%Y%m%dT%H%M%S%f")
    return datetime.now(UTC) - made.replace(tzinfo=UTC) > _SURELY_DEAD
