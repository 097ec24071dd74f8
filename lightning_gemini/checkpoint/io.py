"""Lightning's plugin for reading and writing checkpoints."""

from __future__ import annotations

import os
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from lightning_gemini.checkpoint.full_file import read_full, write_full
from lightning_gemini.checkpoint.kinds import Kind, recognise
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.checkpoint.removal import remove
from lightning_gemini.checkpoint.whole import whole_checkpoint
from lightning_gemini.core.errors import CheckpointError, ConfigurationError


class GeminiCheckpointIO(CheckpointIO):  # type: ignore[misc]
    """Writes a checkpoint as one file that survives every fault, and reads files and sharded folders with checksums.

    The default of the strategy; works with any other one too: ``Trainer(plugins=[GeminiCheckpointIO()])``. Paths are
    local, or of any file system that fsspec knows.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes an ordinary Lightning file; see :func:`write_full`.

        Raises:
            CheckpointWriteError: it could not be written; the file that was there stays.
            ConfigurationError: there are ``storage_options``.
        """
        if storage_options is not None:
            raise ConfigurationError(
                "storage_options are for a CheckpointIO of your own; GeminiCheckpointIO has none. Settings of a remote "
                "file system belong into fsspec's configuration."
            )
        write_full(checkpoint, path)

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint of either kind, with all tensors of a sharded one in host memory.

        Args:
            map_location: of the tensors of a file, as for ``torch.load``; by default host memory.
            weights_only: ``False`` loads objects of any class; by default only plain data is loaded.

        Raises:
            NotACheckpointError: there is none; says what was found.
            CorruptCheckpointError: it is damaged.
            CheckpointError: it cannot be read, or holds classes that are not allowed.
        """
        if recognise(path) is Kind.SHARDED:
            return whole_checkpoint(CheckpointReader(path), weights_only is not False)
        return read_full(path, map_location or "cpu", weights_only)

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        """Removes a file, a link, or a sharded checkpoint; nothing happens where there is nothing.

        Raises:
            NotACheckpointError: it is a folder of something else, which stays.
            CheckpointError: it cannot be removed.
        """
        fs, name = url_to_fs(os.fspath(path))
        if os.path.islink(name) or not fs.isdir(name):
            _remove_file(fs, name)
        else:
            remove(path)


def _remove_file(fs: AbstractFileSystem, name: str) -> None:
    try:
        fs.rm_file(name)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(f"{name} cannot be removed: {error.strerror or error}.") from error
