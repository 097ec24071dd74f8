"""Checkpoints that are easily told apart: every number, byte and word in one says of which generation it is."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lightning_gemini.checkpoint import CheckpointReader, save
from lightning_gemini.core.errors import NotACheckpointError
from tests.boxed import boxed

LARGE = (3, 20_000)  # rows that are large enough to be written by operations of their own


def full(generation: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whole."""
    return {
        "model.large": torch.full(LARGE, float(generation)),
        "model.half": torch.full((5, 4), generation, dtype=torch.bfloat16),
        "step": torch.tensor(generation),
    }


def mine(generation: int, rank: int, world_size: int) -> dict[str, Tensor]:
    """The tensors as ``rank`` has them: rows of the first one, the others on all ranks."""
    tensors = full(generation)
    rows = range(LARGE[0])[rank::world_size]
    tensors["model.large"] = boxed(tensors["model.large"], [((row, 0), (1, LARGE[1])) for row in rows])
    return tensors


def save_generation(path: Path, generation: int, group: torch.distributed.ProcessGroup | None = None) -> None:
    rank, world_size = (group.rank(), group.size()) if group is not None else (0, 1)
    about = {"generation": generation}
    save(path, mine(generation, rank, world_size), {"trainer.pt": b"%d" % generation * 50}, about, group)


def generation_at(path: Path) -> int | None:
    """Reads everything at ``path``; its generation, ``None`` where there says it is no checkpoint.

    Raises:
        AssertionError: it is a mix.
        CheckpointError: it does not load.
    """
    try:
        reader = CheckpointReader(path)
    except NotACheckpointError:
        return None
    generation = reader.manifest.about["generation"]
    assert reader.attachment("trainer.pt") == b"%d" % generation * 50
    for name, tensor in full(generation).items():
        assert torch.equal(reader.tensor(name), tensor)
    return generation


def listing(path: Path) -> list[str]:
    """All files and folders below ``path``, with the save's id as ``SAVE``."""
    save_id = json.loads((path / "checkpoint.json").read_text())["save_id"]
    return sorted(entry.relative_to(path).as_posix().replace(save_id, "SAVE") for entry in path.rglob("*"))


def clean(world_size: int) -> list[str]:
    """What :func:`listing` says of a checkpoint beside which nothing is left."""
    return sorted(
        ["checkpoint.json", "SAVE", "SAVE/trainer.pt", *(f"SAVE/rank{r}.safetensors" for r in range(world_size))]
    )
