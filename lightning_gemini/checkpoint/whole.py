"""A sharded checkpoint as the dict that plain Lightning would have saved."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_gemini.checkpoint.contents import put_together
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.checkpoint.saving import TRAINER_FILE
from lightning_gemini.checkpoint.scalars import from_json
from lightning_gemini.checkpoint.state import OPTIMIZERS, parse_state_fqn
from lightning_gemini.core.errors import CheckpointError, CorruptCheckpointError


def whole_checkpoint(
    reader: CheckpointReader, weights_only: bool = True, tensor: Callable[[str], Tensor] | None = None
) -> dict[str, Any]:
    """Puts a sharded checkpoint together, on one process.

    Args:
        weights_only: whether only plain data is unpickled of what callbacks and hooks have added.
        tensor: makes a tensor from its name in the checkpoint; by default ``reader.tensor``, which reads it.

    Returns:
        what a Trainer saves: the weights under ``state_dict``; under ``optimizer_states`` for each optimizer what its
        ``state_dict()`` is without chunks, with parameters numbered in the order of its groups.

    Raises:
        CorruptCheckpointError: a file is damaged.
        CheckpointError: it holds classes that ``weights_only`` does not allow.
    """
    made: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        """Once for each name: tied weights are one tensor."""
        if name not in made:
            made[name] = (tensor or reader.tensor)(name)
        return made[name]

    rest = read_rest(reader, weights_only)
    if "optimizer_states" in rest:
        filled = _optimizer_states(reader, get, len(rest["optimizer_states"]))
        rest["optimizer_states"] = [
            {**settings, "state": state} for settings, state in zip(rest["optimizer_states"], filled, strict=True)
        ]
    checkpoint: dict[str, Any] = put_together(rest, get)
    return checkpoint


def read_rest(reader: CheckpointReader, weights_only: bool) -> dict[str, Any]:
    """Everything but the tensors, which have left marks (see :mod:`contents`).

    Raises:
        CorruptCheckpointError: the file is damaged.
        CheckpointError: it holds classes that ``weights_only`` does not allow.
    """
    data = io.BytesIO(reader.attachment(TRAINER_FILE))
    try:
        rest: dict[str, Any] = torch.load(data, "cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        data.seek(0)
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(data))
        raise CheckpointError(
            f"{reader.where} holds objects of {', '.join(names)}, which are not loaded by default, since that can run "
            "any code. If you trust whoever wrote it, pass weights_only=False (on the command line "
            "--no-weights-only), or allow these with torch.serialization.add_safe_globals."
        ) from error
    return rest


def _optimizer_states(
    reader: CheckpointReader, get: Callable[[str], Tensor], count: int
) -> list[dict[int, dict[str, Any]]]:
    """The ``state`` of each optimizer: by a parameter's number, and there by the state's name."""
    numbers = [_numbers(groups) for groups in parameter_groups(reader)]
    if len(numbers) != count:
        raise CorruptCheckpointError(f"{reader.where} says of {len(numbers)} optimizers what is in {count}.")
    result: list[dict[int, dict[str, Any]]] = [{} for _ in numbers]
    for optimizer, about in enumerate(reader.manifest.about.get(OPTIMIZERS, ())):
        for param, scalars in about["scalars"].items():
            state = result[optimizer].setdefault(numbers[optimizer][param], {})
            state |= {key: from_json(value) for key, value in scalars.items()}
    for name in reader.manifest.tensors:
        parsed = parse_state_fqn(name)
        if parsed is not None:
            optimizer, param, key = parsed
            result[optimizer].setdefault(numbers[optimizer][param], {})[key] = get(name)
    return [dict(sorted(states.items())) for states in result]


def parameter_groups(reader: CheckpointReader) -> list[list[list[str]]]:
    """The names of the parameters in each group of each optimizer."""
    optimizers: Sequence[Mapping[str, Any]] = reader.manifest.about["fingerprint"][OPTIMIZERS]
    return [one["groups"] for one in optimizers]


def _numbers(groups: Sequence[Sequence[str]]) -> dict[str, int]:
    return {name: number for number, name in enumerate(chain.from_iterable(groups))}
