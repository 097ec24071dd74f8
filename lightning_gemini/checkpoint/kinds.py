"""What kind of checkpoint lies at a path; where there is none, what lies there and what to do with it."""

from __future__ import annotations

import fnmatch
import os
import shlex
import zipfile
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_gemini.checkpoint.full_file import PICKLE_MAGIC, ZIP_MAGIC
from lightning_gemini.checkpoint.lock import LOCK_NAME
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME, is_save_id
from lightning_gemini.checkpoint.sweep import is_ours
from lightning_gemini.core.errors import CheckpointError, CorruptCheckpointError, NotACheckpointError

_LISTED = 8  # names in a message
_LOOKED_AT = 2000  # files and folders, for a message


class Kind(Enum):
    """What reads a checkpoint."""

    SHARDED = auto()
    """a folder of this package, with a manifest: ``CheckpointReader``"""

    FULL = auto()
    """one file of ``torch.save``: ``read_full``"""


def recognise(path: str | os.PathLike[str]) -> Kind:
    """Which kind of checkpoint lies at ``path``, by a look at names and first bytes; it may be damaged or of a newer
    version.

    Args:
        path: local, or of any file system that fsspec knows.

    Raises:
        NotACheckpointError: there is none; says what was found, and what to use or which tool converts it.
        CorruptCheckpointError: an empty file.
        CheckpointError: the path cannot be read.
    """
    where = os.fspath(path)
    try:
        fs, name = url_to_fs(where)
        if fs.isdir(name):
            return _recognise_folder(fs, name, where)
        if fs.isfile(name):
            return _recognise_file(fs, name, where)
        raise NotACheckpointError(_nothing(fs, name, where))
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}.") from error
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}.") from error


def why_not_sharded(path: str | os.PathLike[str]) -> str:
    """For the message of an error: what lies at ``path``, which holds no sharded checkpoint."""
    try:
        recognise(path)
    except CheckpointError as error:
        return str(error)
    return f"expected a folder for a sharded checkpoint, {os.fspath(path)} is a file."


def is_unfinished(names: Collection[str]) -> bool:
    """Whether a folder with these names in it is what a killed first save leaves, or a killed removal."""
    return MANIFEST_NAME not in names and any(is_ours(name) or name == LOCK_NAME for name in names)


def entries(fs: AbstractFileSystem, folder: str) -> dict[str, bool]:
    """The names in a folder, sorted, each with whether it is a folder itself; links count as what they point to.

    Raises:
        OSError: the folder cannot be read.
    """
    found = {}
    for info in fs.ls(folder, detail=True):
        path = info["name"].rstrip("/")
        if path != folder.rstrip("/"):  # object stores list the folder itself
            is_folder = fs.isdir(path) if info.get("islink") else info["type"] == "directory"
            found[path.rpartition("/")[2]] = is_folder
    return dict(sorted(found.items()))


def _nothing(fs: AbstractFileSystem, name: str, where: str) -> str:
    if isinstance(fs, LocalFileSystem):
        if os.path.islink(name):
            return f"{where} is a link to {os.readlink(name)}, where there is nothing."
        if os.path.lexists(name):
            return f"{where} is neither a folder nor a file."
    above = fs._parent(name)
    if not fs.isdir(above):
        return f"there is nothing at {where}, not even the folder it would be in."
    return f"there is nothing at {where}. The folder it would be in holds {_list(entries(fs, above))}."


# Files


def _recognise_file(fs: AbstractFileSystem, name: str, where: str) -> Kind:
    folder, _, file = where.rstrip("/").rpartition("/")
    if file == MANIFEST_NAME:
        raise NotACheckpointError(f"{where} is a part of a sharded checkpoint. Give its folder, {folder or '.'}.")
    above, _, parent = folder.rpartition("/")
    if is_save_id(parent):
        raise NotACheckpointError(f"{where} is a part of a sharded checkpoint. Give its folder, {above or '.'}.")
    with fs.open(name, "rb") as content:
        head = content.read(16)
        content.seek(0)
        if not head:
            raise CorruptCheckpointError(f"{where} is an empty file.")
        if head.startswith(ZIP_MAGIC):
            names = _zip_names(content)
            if "constants.pkl" in names:
                raise NotACheckpointError(
                    f"{where} is a TorchScript archive, a program with weights. Take its state_dict(): "
                    f"torch.jit.load({where!r}).state_dict()."
                )
            if names and "data.pkl" not in names:
                listed = _list(dict.fromkeys(names, False))
                raise NotACheckpointError(f"{where} is a zip archive, but not one of torch.save: it holds {listed}.")
            return Kind.FULL
    if head.startswith(PICKLE_MAGIC):
        return Kind.FULL
    if file.endswith(".safetensors") or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**8):
        raise NotACheckpointError(
            f"{where} is a safetensors file: weights alone, without a state of training. Load it into the model with "
            "safetensors.torch.load_model, or give the folder it is in to lightning_gemini.from_pretrained."
        )
    raise NotACheckpointError(f"{where} is no checkpoint: a file that begins with {head!r}.")


def _zip_names(content: object) -> list[str]:
    """The names in an archive without its own; empty where its directory is damaged."""
    try:
        with zipfile.ZipFile(content) as archive:  # type: ignore[call-overload]
            return [name.partition("/")[2] or name for name in archive.namelist()]
    except Exception:
        return []


# Folders


@dataclass(frozen=True)
class _Foreign:
    """A folder that another program wrote.

    Attributes:
        what: it is, and of which program.
        patterns: of names; one that is there tells it.
        also: another pattern that has to be there too.
        advice: what to do with the folder ``{path}``, or ``{quoted}`` for a shell.
    """

    what: str
    patterns: tuple[str, ...]
    advice: str
    also: str = "*"


_FOREIGN = (
    _Foreign(
        "a checkpoint of DeepSpeed",
        ("zero_to_fp32.py", "mp_rank_*", "zero_pp_rank_*", "bf16_zero_pp_rank_*"),
        "Convert its weights with lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict("
        "{path!r}, 'out.ckpt'), or with the zero_to_fp32.py in it",
    ),
    _Foreign(
        "a sharded checkpoint of Lightning's FSDP or ModelParallel strategy",
        ("meta.pt",),
        "Convert it with python -m lightning.pytorch.utilities.consolidate_checkpoint {quoted}",
        also=".metadata",
    ),
    _Foreign(
        "a checkpoint of torch.distributed.checkpoint",
        (".metadata", "*.distcp"),
        "Convert it with python -m torch.distributed.checkpoint.format_utils dcp_to_torch {quoted} out.pt",
    ),
    _Foreign(
        "an adapter of peft",
        ("adapter_config.json",),
        "Load it into the model with peft.PeftModel.from_pretrained, before training",
    ),
    _Foreign(
        "a Hugging Face model",
        ("*.safetensors", "*.bin", "*.index.json"),
        "Load its weights with lightning_gemini.from_pretrained",
        also="config.json",
    ),
)


def _recognise_folder(fs: AbstractFileSystem, name: str, where: str) -> Kind:
    found = entries(fs, name)
    if MANIFEST_NAME in found:
        return Kind.SHARDED
    if not found:
        raise NotACheckpointError(f"{where} is an empty folder.")
    last = where.rstrip("/").rpartition("/")
    if is_save_id(last[2]):
        raise NotACheckpointError(f"{where} is a part of a sharded checkpoint. Give its folder, {last[0] or '.'}.")
    if is_unfinished(found):
        raise NotACheckpointError(
            f"{where} is a sharded checkpoint whose save, or removal, was not finished: it has no {MANIFEST_NAME}. Use "
            "another one; the next save to this path removes what is left of this one."
        )
    for inner, inside in ((where, found), *_subfolders(fs, name, where, found)):
        for foreign in _FOREIGN:
            if _matches(foreign, inside):
                advice = foreign.advice.format(path=inner, quoted=shlex.quote(inner))
                raise NotACheckpointError(f"{inner} is {foreign.what}: it holds {_list(found)}. {advice}.")
    below = list(_checkpoints_below(fs, name, where))
    if below:
        more = " and others" if len(below) > _LISTED else ""
        raise NotACheckpointError(
            f"{where} is no checkpoint itself, but holds some: {', '.join(below[:_LISTED])}{more}. Give one of them; "
            "lightning_gemini.newest_checkpoint finds the newest."
        )
    raise NotACheckpointError(f"{where} is a folder, but no checkpoint: it has no {MANIFEST_NAME}, but {_list(found)}.")


def _matches(foreign: _Foreign, names: dict[str, bool]) -> bool:
    return any(fnmatch.filter(names, pattern) for pattern in foreign.patterns) and bool(
        fnmatch.filter(names, foreign.also)
    )


def _subfolders(
    fs: AbstractFileSystem, name: str, where: str, found: dict[str, bool]
) -> Iterator[tuple[str, dict[str, bool]]]:
    """The folder that the file ``latest`` of DeepSpeed names, with what is in it; Lightning calls it ``checkpoint``."""
    if found.get("latest") is False and found.get("checkpoint"):
        yield where, entries(fs, f"{name}/checkpoint")
    elif found.get("latest") is False:
        for folder in (folder for folder, is_folder in found.items() if is_folder):
            yield where, entries(fs, f"{name}/{folder}")


def _checkpoints_below(fs: AbstractFileSystem, name: str, where: str) -> Iterator[str]:
    for path, inside in islice(walk(fs, name), _LOOKED_AT):
        shown = where.rstrip("/") + path.removeprefix(name.rstrip("/"))
        if (inside is None and path.endswith(".ckpt")) or MANIFEST_NAME in (inside or ()):
            yield shown


def walk(fs: AbstractFileSystem, folder: str) -> Iterator[tuple[str, dict[str, bool] | None]]:
    """What lies below ``folder``, breadth first: paths, each with what is in it, or ``None`` for files.

    Hidden folders are left out, and so is what cannot be read; checkpoints are not entered, and no folder twice.
    """
    folder = folder.rstrip("/")
    queue, seen = deque([folder]), set()
    while queue:
        current = queue.popleft()
        real = os.path.realpath(current) if isinstance(fs, LocalFileSystem) else current
        if real in seen:
            continue
        seen.add(real)
        try:
            inside = entries(fs, current)
        except OSError:
            continue
        if current != folder:
            yield current, inside
            if MANIFEST_NAME in inside or is_unfinished(inside):
                continue
        for name, is_folder in inside.items():
            if not is_folder:
                yield f"{current}/{name}", None
            elif not name.startswith("."):
                queue.append(f"{current}/{name}")


def _list(names: dict[str, bool]) -> str:
    shown = [f"{name}/" if is_folder else name for name, is_folder in names.items()]
    if not shown:
        return "nothing"
    return ", ".join(shown[:_LISTED]) + (f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else "")
