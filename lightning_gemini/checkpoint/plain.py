"""Checkpoints of an engine in a plain PyTorch loop, without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch.distributed as dist

from lightning_gemini.checkpoint.contents import STATE_DICT, put_together
from lightning_gemini.checkpoint.fingerprint import fingerprint, require_same
from lightning_gemini.checkpoint.lazy import LAZY_STATES, stored_tensor
from lightning_gemini.checkpoint.loading import note_values, on_all
from lightning_gemini.checkpoint.reader import open_checkpoint
from lightning_gemini.checkpoint.saving import ShardedSave
from lightning_gemini.checkpoint.state import flat_model, flat_optimizer, load_states
from lightning_gemini.checkpoint.whole import read_rest
from lightning_gemini.core import Engine
from lightning_gemini.core.errors import IncompatibleCheckpointError
from lightning_gemini.core.optimizer_state import load_groups


def save_checkpoint(
    engine: Engine,
    path: str | PathLike[str],
    extra: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Saves the model and the optimizers of ``engine`` into the folder ``path``; all ranks call, between two steps.

    Args:
        extra: what else to save, such as a step count: plain data and tensors. Rank 0's counts.
        group: the engine's ranks, in a group for host memory (gloo); ``None`` for a process alone.

    Raises:
        CheckpointWriteError: it failed, on any rank; what was at ``path`` is still there.
    """
    optimizers = [chunks.optimizer for chunks in engine.optimizers]
    checkpoint = {
        STATE_DICT: flat_model(engine, engine.model)[0],
        "optimizer_states": [flat_optimizer(engine, optimizer) for optimizer in optimizers],
        "extra": dict(extra or {}),
    }
    about = {"fingerprint": fingerprint(engine.model, optimizers, engine.store.policy)}
    ShardedSave(checkpoint, about, group).write(path)


def load_checkpoint(
    engine: Engine,
    path: str | PathLike[str],
    optimizers: bool = True,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Loads what :func:`save_checkpoint` has saved, from any number of ranks; all ranks call, between two steps.

    Args:
        optimizers: whether their states are loaded; otherwise they stay as they are.
        group: as of :func:`save_checkpoint`.

    Returns:
        what was saved as ``extra``.

    Raises:
        IncompatibleCheckpointError: it is of another model, or of other optimizers; nothing has changed.
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    wanted = list(engine.optimizers) if optimizers else []
    reader = open_checkpoint(path, group)
    with on_all(engine.store.collectives):
        rest, saved = read_rest(reader, weights_only=True), reader.manifest.about.get("fingerprint")
        if saved is None or len(rest.get("optimizer_states", ())) < len(wanted):
            raise IncompatibleCheckpointError(
                f"{reader.where} holds {'no states of optimizers' if saved else 'tensors alone'}. Give a folder that "
                "save_checkpoint or a Trainer has written, with optimizers=False if weights alone are wanted."
            )
        now = fingerprint(engine.model, [chunks.optimizer for chunks in wanted], engine.store.policy)
        require_same({**saved, "optimizers": saved["optimizers"] if wanted else []}, now, path)
    state = put_together(rest[STATE_DICT], partial(stored_tensor, reader))
    with engine.loading() as fill:
        fill(note_values(engine.model, state)[0])
    for chunks, saved_state in zip(wanted, rest.get("optimizer_states", ()), strict=False):
        with on_all(engine.store.collectives):
            load_states(engine.store, chunks, saved_state["state"][LAZY_STATES], reader)
        load_groups(chunks.optimizer, saved_state["param_groups"])
    extra: dict[str, Any] = rest.get("extra", {})
    return extra
