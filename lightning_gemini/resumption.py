"""What a run takes from a checkpoint, and what must match."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, Literal, get_args

import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_gemini.checkpoint.contents import STATE_DICT, put_together
from lightning_gemini.checkpoint.fingerprint import require_same
from lightning_gemini.checkpoint.io import GeminiCheckpointIO
from lightning_gemini.checkpoint.kinds import Kind, recognise
from lightning_gemini.checkpoint.lazy import LAZY_STATES, LazyStates, stored_tensor
from lightning_gemini.checkpoint.loading import LoadedWeights, note_values, on_all
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME
from lightning_gemini.checkpoint.reader import open_checkpoint
from lightning_gemini.checkpoint.state import load_states
from lightning_gemini.checkpoint.whole import read_rest
from lightning_gemini.checkpointing import EXTRA
from lightning_gemini.core import ConfigurationError, Engine
from lightning_gemini.core.errors import IncompatibleCheckpointError, NotACheckpointError
from lightning_gemini.core.optimizer_state import load_groups, require_groups

Resume = Literal["exact", "cast", "weights"]

_SHOWN = 10


class Resumption:
    """How a run goes on from a checkpoint.

    Args:
        resume: what a fit takes: everything, "exact" or with a "cast" to another precision, or the "weights" only.

    Attributes:
        loaded: weights that wait for an engine.

    Raises:
        ConfigurationError: a setting that does not exist.
    """

    def __init__(self, resume: Resume) -> None:
        if resume not in get_args(Resume):
            raise ConfigurationError(f"resume must be one of {', '.join(get_args(Resume))}, got {resume!r}.")
        self._resume = resume
        self._expected: tuple[Mapping[str, Any], object] | None = None  # of the checkpoint that a fit is to go on from
        self.loaded: LoadedWeights | None = None

    def compare(self, fingerprint: Mapping[str, Any], strict: bool) -> None:
        """Before a model is laid out to be trained: compares it with the checkpoint that was loaded.

        Raises:
            IncompatibleCheckpointError: they do not go together.
        """
        expected, self._expected = self._expected, None
        if expected is not None and fingerprint["optimizers"] and self._resume != "weights":
            require_same(expected[0], fingerprint, expected[1], strict, cast=self._resume == "cast")

    def load(self, path: str | PathLike[str], files: CheckpointIO, weights_only: bool | None) -> dict[str, Any]:
        """A checkpoint of either kind, as Lightning wants to see it.

        Args:
            files: reads those that are one file.
            weights_only: whether only plain data is unpickled; by default it is.

        Raises:
            CheckpointError: it is damaged, or none at all.
        """
        own = isinstance(files, GeminiCheckpointIO)
        if recognise(path) is Kind.SHARDED if own else _has_manifest(path):
            return self._open(path, weights_only is not False)
        checkpoint: dict[str, Any] = files.load_checkpoint(path, map_location="cpu", weights_only=weights_only)
        if own and "pytorch-lightning_version" not in checkpoint:
            raise NotACheckpointError(
                f"{os.fspath(path)} is a file of torch.save, but not of a Trainer: it has the keys "
                f"{', '.join(map(repr, list(checkpoint)[:5]))}{', ...' if len(checkpoint) > 5 else ''}. If these are "
                "weights, load them into the model with load_state_dict before training."
            )
        return checkpoint

    def _open(self, path: str | PathLike[str], weights_only: bool) -> dict[str, Any]:
        """A sharded checkpoint as Lightning wants to see it; tensors are read when they are needed.

        Args:
            weights_only: whether what is no tensor is unpickled by torch's restricted unpickler.

        Raises:
            CheckpointError: it is damaged, or none at all.
        """
        reader = open_checkpoint(path, dist.group.WORLD if dist.is_initialized() else None)
        rest = read_rest(reader, weights_only)
        for state in rest.get("optimizer_states", []):
            state["state"] = LazyStates(reader, state["state"][LAZY_STATES])
        checkpoint: dict[str, Any] = put_together(rest, partial(stored_tensor, reader))
        return checkpoint

    def take(self, checkpoint: dict[str, Any], path: object, fitting: bool) -> dict[str, Any]:
        """What a run takes from a checkpoint of either kind that was loaded from ``path``.

        Raises:
            IncompatibleCheckpointError: a fit is to go on from weights alone.
        """
        extra = checkpoint.get(EXTRA, {})
        if fitting and self._resume != "weights" and "optimizer_states" not in checkpoint:
            raise IncompatibleCheckpointError(
                f"{path} holds weights alone (save_weights_only=True), so a fit cannot go on where it was saved. "
                "GeminiStrategy(resume='weights') begins a new one with these weights."
            )
        if fitting and "fingerprint" in extra:
            self._expected = extra["fingerprint"], path
        if fitting and self._resume == "weights":
            checkpoint = {key: value for key, value in checkpoint.items() if key not in ("loops", "callbacks")}
            checkpoint |= {"optimizer_states": [], "lr_schedulers": []}
            checkpoint[EXTRA] = {"left_out": extra.get("left_out", [])}
        return checkpoint

    def note_model(self, module: nn.Module, checkpoint: Mapping[str, Any], strict: bool) -> LoadedWeights:
        """``module.load_state_dict(checkpoint["state_dict"], strict)``, but for the weights: these are for an engine.

        Raises:
            IncompatibleCheckpointError: tensors have another shape, or keys are missing, or unexpected, and ``strict``;
                the module is as it was.
        """
        left_out = set(checkpoint.get(EXTRA, {}).get("left_out", ()))
        weights, missing, unexpected = note_values(module, checkpoint[STATE_DICT])
        missing = [key for key in missing if key not in left_out]
        if missing or unexpected:
            text = _differing_keys(type(module).__name__, missing, unexpected)
            if strict:
                weights.take_back()
                raise IncompatibleCheckpointError(
                    f"{text}\nLoad into the model that was saved, or set self.strict_loading = False in the "
                    "LightningModule to take what is there."
                )
            rank_zero_warn(f"strict_loading is False: {text}")
        return weights

    def load_optimizers(self, engine: Engine, optimizers: Sequence[Optimizer], checkpoint: Mapping[str, Any]) -> None:
        """Loads the states of all optimizers, and their groups' settings.

        Raises:
            ConfigurationError: there are others than in the checkpoint.
            CheckpointError: a file is damaged.
        """
        states = checkpoint["optimizer_states"]
        if self._resume == "weights" and not states:
            return
        if len(states) != len(optimizers):
            raise ConfigurationError(
                f"the checkpoint has the states of {len(states)} optimizers, but there are {len(optimizers)}. Resume "
                "with the same ones, or take the weights only: GeminiStrategy(resume='weights')."
            )
        for optimizer, state in zip(optimizers, states, strict=True):
            if isinstance(state["state"], LazyStates):
                require_groups(optimizer, state["param_groups"])
                with on_all(engine.store.collectives):
                    lazy = state["state"]
                    load_states(engine.store, engine.optimizers.of(optimizer), lazy.number, lazy.reader)
                load_groups(optimizer, state["param_groups"])
            else:
                engine.load_optimizer_state_dict(optimizer, state)


def _has_manifest(path: str | PathLike[str]) -> bool:
    return os.path.isfile(os.path.join(path, MANIFEST_NAME))


def _differing_keys(name: str, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    lines = [f"the checkpoint and {name} have different keys."]
    for what, keys in (("missing in the checkpoint", missing), ("unexpected in the checkpoint", unexpected)):
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            lines.append(f"  {what}: {', '.join(keys[:_SHOWN])}{more}")
    return "\n".join(lines)
