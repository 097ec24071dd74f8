"""Exports the models of transformers in a checkpoint to folders that ``from_pretrained`` reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

from lightning_gemini.checkpoint.huggingface_about import unpack_tokenizer
from lightning_gemini.checkpoint.huggingface_files import AdapterFiles, ExportPlan, ModelFiles
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.checkpoint.weight_file import WeightFile
from lightning_gemini.core.errors import ConfigurationError, IncompatibleCheckpointError


@dataclass(frozen=True)
class Exported:
    """What was written of one model.

    Attributes:
        folder: where it is.
        kind: the model's class; of adapters, that of their base.
        adapters: whether these alone were written.
        weights: the names of the files with weights.
        nbytes: of the weights.
        tokenizer: where it is from, ``None`` if there is none.
    """

    folder: Path
    kind: str
    adapters: bool
    weights: tuple[str, ...]
    nbytes: int
    tokenizer: str | None


def export(
    reader: CheckpointReader,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Exported]:
    """Writes what ``save_pretrained`` of the whole model would: weights, ``config.json``, generation config, tokenizer.

    Of models with adapters of peft these alone are written, as peft does. Tensor by tensor: in memory is what has to be
    converted together, one tensor mostly. ``out`` appears when everything is in it and on the disk.

    Args:
        reader: the checkpoint; its manifest has a description by :func:`huggingface_about.describe`.
        out: a folder that does not exist, or is empty. If the checkpoint has several models, each gets a folder of its
            own in it, named as in the LightningModule.
        dtype: of the weights; as they are in the checkpoint if not given (with masters, fp32). Weights that the model
            wants in fp32 even so stay fp32.
        tokenizer: a name or path to take the tokenizer from, instead of the checkpoint.
        max_shard_size: bytes of weights in a file, or a text such as "500MB".
        progress: told the bytes written so far, and how many there will be.

    Raises:
        ConfigurationError: ``out`` is not empty, or a setting cannot work.
        IncompatibleCheckpointError: there is no model of transformers in the checkpoint, or something of it is missing.
        CorruptCheckpointError: a weight is damaged.
        OSError: it cannot be written.

        What has been written until then is gone.
    """
    described = _described(reader)
    out = _empty(out)
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigurationError(f"dtype must be of floating-point numbers, got {dtype}.")
    words = _Tokenizer(tokenizer, described["tokenizer"])
    models = described["models"]
    plans: list[ExportPlan] = [
        (AdapterFiles if "adapters" in model else ModelFiles)(reader, model, dtype, max_shard_size) for model in models
    ]
    # each in a folder of its own if there are several
    names = [model["prefix"].rstrip(".") if len(models) > 1 else "" for model in models]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{token_hex(4)}.tmp"
    told = _Progress(progress, sum(_nbytes(plan) for plan in plans))
    try:
        for plan, name in zip(plans, names, strict=True):
            _write(plan, temporary / name, told)
            words.write(temporary / name)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        temporary.replace(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [
        Exported(out / name, model["class"], "adapters" in model, tuple(plan.weights), _nbytes(plan), words.source)
        for plan, name, model in zip(plans, names, models, strict=True)
    ]


def _described(reader: CheckpointReader) -> Mapping[str, Any]:
    described: Mapping[str, Any] | None = reader.manifest.about.get("huggingface")
    if described is None:
        raise IncompatibleCheckpointError(
            f"{reader.where} has no model of transformers in it (a PreTrainedModel inside the LightningModule). "
            "lightning-gemini consolidate writes the weights of any model into one file."
        )
    for model in described["models"]:
        if "problem" in model:
            raise IncompatibleCheckpointError(
                f"{reader.where}: {model['class']} at {model['prefix']}* cannot be exported; when it was saved: "
                f"{model['problem']}. lightning-gemini consolidate writes the weights of any model into one file."
            )
    return described


def _empty(out: Path) -> Path:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigurationError(f"{out} exists and is no empty folder. Give another one; nothing is overwritten.")
    return out.resolve()


class _Tokenizer:
    """The tokenizer that goes with the models; one that is asked for is loaded before anything is written."""

    def __init__(self, asked: str | None, described: Mapping[str, Any] | None) -> None:
        self._loaded: Any = None
        self._described = described if described is not None and "files" in described else None
        self.source = asked if asked is not None else None if self._described is None else "the checkpoint"
        if asked is not None:
            from transformers import AutoTokenizer

            try:
                self._loaded = AutoTokenizer.from_pretrained(asked)
            except Exception as error:
                raise ConfigurationError(f"tokenizer {asked!r} cannot be loaded: {error}") from error

    def write(self, folder: Path) -> None:
        if self._loaded is not None:
            self._loaded.save_pretrained(folder)
        elif self._described is not None:
            unpack_tokenizer(self._described, folder)


class _Progress:
    def __init__(self, told: Callable[[int, int], None], total: int) -> None:
        self._told, self._done, self._total = told, 0, total
        told(0, total)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._told(self._done, self._total)


def _nbytes(plan: ExportPlan) -> int:
    return sum(tensor.nbytes for tensors in plan.weights.values() for tensor in tensors.values())


def _write(plan: ExportPlan, folder: Path, progress: _Progress) -> None:
    for name, text in plan.texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    with ExitStack() as stack:
        files = {name: stack.enter_context(WeightFile(folder / name, held)) for name, held in plan.weights.items()}
        for name, key, value in plan.tensors():
            progress.add(files[name].write(key, value))


def _sync(path: Path) -> None:
    """Has a file's content, or a folder's entries, be on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
