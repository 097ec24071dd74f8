"""The subcommand `lightning-gemini export`: a checkpoint as a folder that other programs read."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lightning_gemini.checkpoint.huggingface import Exported
from lightning_gemini.checkpoint.huggingface import export as export_to
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.core.errors import GeminiError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    checkpoint: str, out: Path, format: str, dtype: str | None, tokenizer: str | None, max_shard_size: str
) -> None:
    """Exports the models of transformers in `checkpoint` to the folder `out`, and says what is in it.

    Exits with code 1 and one line on stderr if that cannot be done.

    Args:
        format: "huggingface", so far.
        dtype: a key of `DTYPES`, or `None` for the checkpoint's own.
        tokenizer: the name or path of one to put beside the model, instead of the checkpoint's.
        max_shard_size: bytes of weights in a file, as "5GB".
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("exporting", total=None)
            done = export_to(
                CheckpointReader(checkpoint),
                out,
                dtype=None if dtype is None else DTYPES[dtype],
                tokenizer=tokenizer,
                max_shard_size=max_shard_size,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except (GeminiError, OSError) as error:
        sys.exit(f"lightning-gemini export: {error}")
    for exported in done:
        print(words(exported))


def words(exported: Exported) -> str:
    """What was exported, in a line."""
    what = f"adapters for {exported.kind}" if exported.adapters else exported.kind
    count = len(exported.weights)
    size = f"{exported.nbytes / 2**20:,.1f} MiB in {count} file{'s' * (count > 1)}"
    if exported.tokenizer is None:
        tokenizer = "no tokenizer (--tokenizer NAME_OR_PATH adds one)"
    else:
        tokenizer = f"tokenizer of {exported.tokenizer}"
    return f"{exported.folder}: {what}, {size}, {tokenizer}"
