"""Leaves one step of a run in its folder, for ``lightning-gemini report``."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lightning_gemini.core import Engine
from lightning_gemini.core.timeline import file_name


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of a run: the logger's or, without one, ``default_root_dir``; rank 0's counts, and all ranks call."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def write_step(trainer: L.Trainer, engine: Engine) -> None:
    """Writes a step of rank 0 into the run's folder, if it has one and if chunks move.

    The folder is the logger's or, without one, ``default_root_dir`` where that is not merely the working directory.
    All ranks have to call.
    """
    has_folder = bool(trainer.loggers) or Path(trainer.default_root_dir).resolve() != Path.cwd()
    if not engine.moving or trainer.fast_dev_run or not has_folder:
        return
    folder = run_folder(trainer)
    if not trainer.is_global_zero:
        return
    path = folder / file_name(trainer.global_rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(engine.timeline().to_json())
    except OSError as error:  # no reason for a run to fail
        L.pytorch.utilities.rank_zero_warn(f"the step for lightning-gemini report could not be written: {error}")
