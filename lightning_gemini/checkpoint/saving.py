"""A Lightning checkpoint on its way into a folder."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_gemini.checkpoint.contents import take_apart
from lightning_gemini.checkpoint.flat import FlatTensor
from lightning_gemini.checkpoint.lazy import LAZY_STATES, PLAIN
from lightning_gemini.checkpoint.scalars import is_scalar, to_json
from lightning_gemini.checkpoint.state import OPTIMIZERS, parse_state_fqn, state_fqn
from lightning_gemini.checkpoint.writer import save
from lightning_gemini.core.errors import CheckpointWriteError, ConfigurationError

#: The file beside the tensors that holds everything else.
TRAINER_FILE = "trainer.pt"

_OPTIMIZER_STATES = "optimizer_states"

_SHOWN = 5


class _Part(NamedTuple):
    """What a rank tells the others."""

    path: str
    error: str
    names: list[str]  #: of its tensors
    flat: list[str]  #: of those that are spread over the ranks
    scalars: list[dict[str, dict[str, Any]]]  #: in the states of each optimizer, by parameter
    step: Any


class ShardedSave:
    """One checkpoint, as this rank is going to write it.

    Made at once, in the thread that trains; what is not in :attr:`tensors` has been copied then.

    Args:
        checkpoint: Lightning's; tensors of the model and of optimizers are spread over the ranks.
        about: what else the manifest is to say; its "fingerprint" names the parameters of each optimizer.
        group: the ranks, in a group for host memory; ``None`` for a process alone.

    Attributes:
        tensors: by name in the checkpoint; other than flat ones those of rank 0 count.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        about: Mapping[str, Any],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._group = group
        self._about = dict(about)
        states = checkpoint.get(_OPTIMIZER_STATES, [])
        rest = {key: value for key, value in checkpoint.items() if key != _OPTIMIZER_STATES}
        rest, self.tensors = take_apart(rest)
        if states:
            rest[_OPTIMIZER_STATES] = [{**state, "state": {LAZY_STATES: number}} for number, state in enumerate(states)]
        self._scalars: list[dict[str, dict[str, Any]]] = []
        self._file, self._error = b"", ""
        for number, state in enumerate(states):
            groups = about["fingerprint"][OPTIMIZERS][number]["groups"]
            self._add_states(number, state["state"], [name for group in groups for name in group])
        if not self._error and (group is None or dist.get_rank(group) == 0):
            self._file, self._error = _serialised(rest)
        else:
            # of the state of a parameter that rank 0 has no part of this rank knows all
            self.tensors = {
                name: one for name, one in self.tensors.items() if isinstance(one, FlatTensor) or parse_state_fqn(name)
            }

    def detach(self) -> None:
        """Copies the tensors that are not flat, which training goes on to change."""
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, FlatTensor):
                self.tensors[name] = tensor.detach().to("cpu", copy=True)

    def write(self, path: str | PathLike[str], patience: timedelta | None = None) -> None:
        """Writes everything; all ranks of the group together, in any thread.

        Args:
            path: where to; rank 0's counts.
            patience: how long to wait for the other ranks, which may not come; ``None`` for the group's own timeout.

        Raises:
            CheckpointWriteError: it failed, on any rank; the checkpoint that was at ``path`` is still there.
        """
        if self._file:
            _warn_of_objects(self._file)  # not in __init__: training waits for that
        flat = [name for name, tensor in self.tensors.items() if isinstance(tensor, FlatTensor)]
        mine = _Part(str(path), self._error, list(self.tensors), flat, self._scalars, self._about.get("global_step"))
        every: list[_Part] = exchange(mine, self._group, patience)
        path = every[0].path
        if error := _problem(every):
            raise CheckpointWriteError(f"the checkpoint {path} cannot be written: {error}")
        scalars = [
            {"scalars": {name: values for part in parts for name, values in part.items()}}
            for parts in zip(*(part.scalars for part in every), strict=True)
        ]
        # rank 0 decides what is saved; of states it knows those that it has a part of
        wanted = {name for part in every for name in part.names if part is every[0] or parse_state_fqn(name)}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in wanted}
        plain = [name for name in self.tensors if name not in set(flat) and not parse_state_fqn(name)]
        about = {**self._about, OPTIMIZERS: scalars, PLAIN: plain}
        save(path, tensors, {TRAINER_FILE: self._file}, about, self._group)

    def _add_states(self, number: int, states: Mapping[int, Mapping[str, Any]], params: Sequence[str]) -> None:
        scalars: dict[str, dict[str, Any]] = {}
        for index, state in states.items():
            for key, value in state.items():
                fqn = state_fqn(number, params[index], key)
                if is_scalar(value) and not isinstance(value, FlatTensor):
                    try:
                        scalars.setdefault(params[index], {})[key] = to_json(value, fqn)
                    except ConfigurationError as error:  # may be this rank's alone, and is for all of them
                        self._error = self._error or str(error)
                else:
                    self.tensors[fqn] = value
        self._scalars.append(scalars)


def _problem(every: Sequence[_Part]) -> str:
    """Why the parts of all ranks do not make a checkpoint; empty if they do."""
    if error := next((part.error for part in every if part.error), ""):
        return error
    if any(part.step != every[0].step for part in every):
        steps = ", ".join(f"rank {rank} at {part.step}" for rank, part in enumerate(every))
        return f"the ranks are at other steps ({steps})."
    for rank, part in enumerate(every):
        # whoever has no part of a state has no such name; of all others each rank has the name
        if lacking := sorted({name for name in every[0].flat if not parse_state_fqn(name)}.difference(part.flat)):
            return (
                f"rank 0 saves {', '.join(lacking[:_SHOWN])}{', ...' if lacking[_SHOWN:] else ''}, and on rank {rank}, "
                "which may hold a part of it, there is no tensor of that name. What on_save_checkpoint renames or adds "
                "has to be the same on all ranks."
            )
    return ""


def exchange(value: Any, group: dist.ProcessGroup | None, patience: timedelta | None = None) -> list[Any]:
    """Every rank's ``value``, by rank; all of them have to call.

    Args:
        group: of host memory; ``None`` for a process alone.
        patience: how long to wait for the other ranks, which may not come; ``None`` for the group's own timeout.

    Raises:
        CheckpointWriteError: they do not come.
    """
    if group is None:
        return [value]
    every: list[Any] = [None] * dist.get_world_size(group)
    try:
        if patience is not None:
            dist.monitored_barrier(group, patience)
        dist.all_gather_object(every, value, group=group)
    except RuntimeError as error:
        within = f" within {patience.total_seconds():.0f} s" if patience is not None else ""
        raise CheckpointWriteError(
            f"no checkpoint: the other ranks did not come to save it{within}, and each holds a part of the state "
            f"({error})"
        ) from error
    return every


def _serialised(rest: Any) -> tuple[bytes, str]:
    """The bytes of the file, and what is wrong."""
    buffer = io.BytesIO()
    try:
        torch.save(rest, buffer)
    except Exception as error:
        return b"", f"what callbacks, hooks and hyperparameters put into it cannot be pickled ({error})"
    return buffer.getvalue(), ""


def _warn_of_objects(data: bytes) -> None:
    """Says what only an unrestricted unpickler would load."""
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        names = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))))
        warnings.warn(
            f"the checkpoint holds objects that are only loaded if you trust the file, {names or error}: "
            "trainer.fit(ckpt_path=..., weights_only=False). They come from callbacks, on_save_checkpoint or "
            "hyperparameters.",
            stacklevel=2,
        )
