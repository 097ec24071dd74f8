"""What a strategy saves: sharded checkpoints, whole ones, in the background or not, and after a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from os import PathLike
from typing import Any, Literal, get_args

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_gemini.checkpoint.after import After
from lightning_gemini.checkpoint.background import BackgroundSaves
from lightning_gemini.checkpoint.contents import like
from lightning_gemini.checkpoint.flat import FlatTensor
from lightning_gemini.checkpoint.huggingface_about import describe
from lightning_gemini.checkpoint.location import open_folder
from lightning_gemini.checkpoint.saving import ShardedSave, exchange
from lightning_gemini.checkpoint.state import flat_model, flat_optimizer
from lightning_gemini.core import ConfigurationError, Engine

StateDictType = Literal["sharded", "full"]

#: In a Lightning checkpoint: what this package adds.
EXTRA = "lightning_gemini"

#: How long ranks that have failed wait for each other before they give a checkpoint up.
_PATIENCE = timedelta(seconds=60)


class Checkpointing:
    """What goes into the checkpoints of a run, and when they are written.

    Args:
        state_dict_type: "sharded" for a folder that all ranks write, "full" for one ordinary Lightning file.
        in_background: whether training goes on while a sharded checkpoint is written.
        frozen: whether parameters that do not require a gradient are saved.

    Raises:
        ConfigurationError: a setting that does not exist, or that does not go with another.
    """

    def __init__(self, state_dict_type: StateDictType, in_background: bool, frozen: bool) -> None:
        if state_dict_type not in get_args(StateDictType):
            raise ConfigurationError(f"state_dict_type must be 'sharded' or 'full', got {state_dict_type!r}.")
        for name, value in (("async_save", in_background), ("save_frozen", frozen)):
            if not isinstance(value, bool):
                raise ConfigurationError(f"{name} must be True or False, got {value!r}.")
        if in_background and state_dict_type == "full":
            raise ConfigurationError(
                "async_save=True writes sharded checkpoints in the background, but state_dict_type is 'full'. Use "
                "state_dict_type='sharded', or Lightning's AsyncCheckpointIO plugin."
            )
        self.state_dict_type = state_dict_type
        self._in_background = in_background
        self._frozen = frozen
        self._group: dist.ProcessGroup | None = None
        self._fingerprint: dict[str, Any] = {}
        self._left_out: list[str] = []
        self._described: dict[str, Any] = {}  # models of transformers, for an export
        self._saves: BackgroundSaves | None = None
        self._after: After | None = None
        self._lost = ""  # why there is nothing after a run

    # A run

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Before a model is laid out."""
        self._after, self._lost, self._described = None, "", {}
        self._fingerprint = fingerprint

    def attach(self, engine: Engine, group: dist.ProcessGroup | None, datamodule: object) -> None:
        """After it has been laid out; ``group`` is of all ranks, for host memory."""
        self._group = group
        if engine.store.collectives.rank == 0 and (found := describe(engine.model, datamodule)) is not None:
            self._described = {"huggingface": found}
        if self._in_background:
            gather, pin = engine.store.collectives.gather_objects, engine.store.device.device.type == "cuda"
            self._saves = BackgroundSaves(engine.store.host, pin, lambda over: all(gather(over, "what has been saved")))

    def check(self) -> None:
        """Raises CheckpointWriteError if a save in the background has failed."""
        if self._saves is not None:
            self._saves.check()

    def wait(self) -> None:
        """Waits for a save in the background, and raises CheckpointWriteError if it fails."""
        if self._saves is not None:
            self._saves.wait()

    def close(self, failed: bool, parted: bool) -> None:
        """The run is over. Waits for a save in the background.

        Args:
            failed: whether an exception ends the run already, so that what a save raises is only a warning.
            parted: whether one rank has failed, and others may not come to write.

        Raises:
            CheckpointWriteError: the save has failed.
        """
        saves, self._saves = self._saves, None
        if saves is None:
            return
        try:
            if not failed:
                saves.wait()
            elif reason := saves.finish(_PATIENCE if parted else None):
                warnings.warn(f"the checkpoint that was saved last is not there: {reason}", stacklevel=2)
        finally:
            saves.close()

    # Saving

    def model_state(self, engine: Engine, module: nn.Module) -> dict[str, Any]:
        """``module.state_dict()`` with parameters that are spread over the ranks.

        Raises:
            ConfigurationError: it computes with weights, which are not whole.
        """
        state, self._left_out = flat_model(engine, module, self._frozen)
        return state

    def whole_model_state(self, engine: Engine, module: nn.Module, here: bool) -> dict[str, Any]:
        """``module.state_dict()`` in fp32, on the rank that is ``here``; all ranks take part."""
        frozen = {name for name, param in module.named_parameters(remove_duplicate=False) if not param.requires_grad}
        self._left_out = sorted(frozen) if not self._frozen else []
        with engine.summon(rank0_only=True, exact=True):
            state = module.state_dict() if here else {}
        return like(state, {key: value for key, value in state.items() if key not in self._left_out})

    def optimizer_state(self, engine: Engine, optimizer: Optimizer) -> dict[str, Any]:
        """``optimizer.state_dict()`` with states that are spread over the ranks; those that this one has a part of."""
        return flat_optimizer(engine, optimizer)

    def extra(self) -> dict[str, Any]:
        """What the next run wants to know of this one."""
        return {"fingerprint": self._fingerprint, "left_out": self._left_out}

    def prepare(self, checkpoint: Mapping[str, Any], path: str | PathLike[str], failed: bool) -> Callable[[], None]:
        """Gets a sharded checkpoint ready to be written on this rank, with a snapshot if that is in the background.

        Args:
            failed: whether the ranks have parted because one has failed, so that not all of them may come.

        Returns:
            what writes it, or begins to; all ranks call it together when all of them are ready. It raises
            CheckpointWriteError if it fails.

        Raises:
            CheckpointWriteError: the save before, which was written in the background, has failed.
            OutOfBudgetError: there is no room for the snapshot.
        """
        about = {key: checkpoint[key] for key in ("epoch", "global_step") if key in checkpoint}
        about |= {**self.extra(), **self._described}
        parts = ShardedSave(checkpoint, about, self._group)
        if self._saves is None:
            return partial(parts.write, path, _PATIENCE if failed else None)
        if failed:
            if reason := self._saves.finish(_PATIENCE):
                warnings.warn(f"the checkpoint that was saved before is not there: {reason}", stacklevel=2)
            return partial(parts.write, path, _PATIENCE)
        parts.detach()
        if "://" not in os.fspath(path):
            open_folder(os.path.dirname(os.path.abspath(path))).make()  # Lightning links there at once
        self._saves.snapshot(parts.tensors.values())
        return partial(self._saves.start, partial(parts.write, path))

    def remove(self, job: Callable[[], None]) -> None:
        """Has ``job`` remove an older checkpoint: not before the one that replaces it is there."""
        if self._saves is None or not self._saves.then(job):
            job()

    def exchange_after_failure(self, value: Any) -> list[Any]:
        """Every rank's ``value``, when the ranks have parted.

        Raises:
            CheckpointWriteError: not all of them come.
        """
        return exchange(value, self._group, _PATIENCE)

    # After a run

    def remember(self, engine: Engine, module: nn.Module) -> None:
        """Keeps what ``trainer.save_checkpoint`` after ``fit`` is to save, if there is room: call before the release.

        The weights are the model's own then, in the dtypes that it was built in, and the optimizers are without state.
        """
        after, room = None, engine.store.host.capacity
        try:
            after = After(engine, module, self._frozen)
            fits = room is None or after.nbytes + engine.weight_bytes <= room
            self._lost = "" if fits else "there is no room for them in host memory"
        except Exception as error:  # of the model's own state_dict(), mostly; nobody has asked for a checkpoint yet
            self._lost = str(error)
        self._lost = next(filter(None, engine.store.collectives.gather_objects(self._lost)), "")
        self._after = None if self._lost else after

    def settle(self) -> None:
        """The model has its weights again, and the engine is gone."""
        if self._after is not None:
            self._after.settle()

    def model_state_after(self, module: nn.Module, sharded: bool) -> dict[str, Any]:
        """The model's state after a run; its present one if it has been changed since.

        A whole one of several ranks is the present one, too, in the dtypes that the model was built in.

        Raises:
            ConfigurationError: the model does not have its weights.
        """
        if self._after is None or self._after.stale or not (sharded or self._group is None):
            return self._present_state(module)
        self._left_out = self._after.left_out
        state = self._after.state
        return state if sharded else like(state, {key: self._whole(value) for key, value in state.items()})

    def optimizer_state_after(self, number: int, sharded: bool) -> dict[str, Any]:
        """The state of an optimizer after a run.

        Raises:
            ConfigurationError: it is gone, or it is spread over ranks and a whole checkpoint is wanted.
        """
        if self._after is None:
            reason = f" ({self._lost})" if self._lost else ""
            raise ConfigurationError(
                f"the states of optimizers are gone{reason}: they are kept after a fit that has not failed, as far as "
                "host memory has room, until the next run. Save in on_train_end or with "
                "ModelCheckpoint(save_last=True), or without them: trainer.save_checkpoint(path, weights_only=True)."
            )
        state = self._after.optimizers[number]
        if sharded:
            return state
        whole = {
            index: {key: self._whole(value) for key, value in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": whole}

    def _present_state(self, module: nn.Module) -> dict[str, Any]:
        """``module.state_dict()`` where there is no engine.

        Raises:
            ConfigurationError: its parameters have no values.
        """
        named = dict(module.named_parameters(remove_duplicate=False))
        blank = [name for name, one in named.items() if one.is_meta or (one.numel() > 1 and not any(one.stride()))]
        if blank:
            raise ConfigurationError(
                f"the model does not hold its weights, such as {blank[0]}: there was no room for all of them, a rank "
                "has failed, or it is on the meta device. Save while the Trainer runs."
            )
        self._left_out = [] if self._frozen else [name for name, param in named.items() if not param.requires_grad]
        state = module.state_dict()
        return like(state, {key: value for key, value in state.items() if key not in self._left_out})

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, FlatTensor):
            return value
        if self._group is not None:
            raise ConfigurationError(
                "after fit the state stays on its ranks, and a whole checkpoint would need all of it on one. Save in "
                "on_train_end or with ModelCheckpoint(save_last=True), or use state_dict_type='sharded'."
            )
        return value.whole()
