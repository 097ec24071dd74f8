"""Where the path of a checkpoint leads."""

from __future__ import annotations

import os

from lightning_gemini.checkpoint.folder import Folder
from lightning_gemini.checkpoint.local import LocalFolder
from lightning_gemini.checkpoint.remote import RemoteFolder
from lightning_gemini.core.errors import CheckpointError


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """The folder at ``path``: a local one, or a remote one for a URL (``s3://...``) as fsspec knows them.

    Raises:
        CheckpointError: fsspec does not know the protocol, or the package for it is not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return LocalFolder(text)
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, inside = url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{text} cannot be reached through fsspec: {error}") from error
    return LocalFolder(inside) if isinstance(system, LocalFileSystem) else RemoteFolder(text, system, inside)
