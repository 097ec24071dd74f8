"""The subcommands of `lightning-gemini` that run a Trainer: fit, validate, test and predict."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_gemini.callbacks import MemoryReport, TokensPerSecond
from lightning_gemini.causal_lm import CausalLM
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.checkpoint.whole import read_rest
from lightning_gemini.data import TextData

DESCRIPTION = "Train models larger than the GPU. Without other instructions: a small language model on text."
MORE_HELP = (
    "Settings of the default model and data: --model.help CausalLM and --data.help TextData. "
    "Any LightningModule and LightningDataModule can take their place: --model my_module.MyModel."
)
WITHOUT_TRAINER_HELP = (
    "Without a Trainer: lightning-gemini report RUN_DIR prints the memory report of a run and draws one of its steps, "
    "verify CHECKPOINT compares a checkpoint with its checksums and says what is in it, consolidate DIR OUT.ckpt makes "
    "one file of a sharded one, export DIR OUT_DIR writes its model for transformers; see lightning-gemini report "
    "--help, and so on."
)
SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 200
PROMPT_ROOM = 8  # positions kept for the prompt
# Enough for two digits of a bigram's entropy, and a fraction of a second however long the split is.
REFERENCE_TOKENS = 10_000_000


class GeminiCLI(LightningCLI):
    """LightningCLI with a language model and text as defaults, and a summary after fit.

    Args:
        args: The command line, by default the process's own.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        # Lightning calls a function of torch that torch wants it to call differently; nobody here can
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        super().__init__(
            L.LightningModule,
            subclass_mode_model=True,
            # without a logger that numbers its runs, a second one meets the config.yaml of the first
            save_config_kwargs={"overwrite": True},
            # an optimizer made here would find no parameters, they come with `configure_model`
            auto_configure_optimizers=False,
            parser_kwargs={
                "parser_mode": "omegaconf",
                "description": DESCRIPTION,
                "epilog": WITHOUT_TRAINER_HELP,
                **{name: {"epilog": MORE_HELP} for name in self.subcommands()},
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the default classes."""
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_gemini.causal_lm.CausalLM"},
                "data": {"class_path": "lightning_gemini.data.TextData"},
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from a sharded checkpoint, too: it is a folder, and Lightning looks into files."""
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if not path or not os.path.isfile(os.path.join(path, MANIFEST_NAME)):
            super()._parse_ckpt_path()
            return
        settings = read_rest(CheckpointReader(path), weights_only=True).get("hyper_parameters", {})
        with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
            torch.save({"hyper_parameters": settings}, file.name)
            self.config[subcommand]["ckpt_path"] = file.name
            super()._parse_ckpt_path()
        self.config[subcommand]["ckpt_path"] = path

    def instantiate_classes(self) -> None:
        """Let a constructor's own error through, which comes wrapped in one about unions of types."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise error.__cause__ or error from None

    def after_instantiate_classes(self) -> None:
        """Prepare the text before other processes start: what is wrong with it is then said once, last."""
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        first = environment is None or not environment.creates_processes_externally
        if first and isinstance(self.datamodule, TextData):
            self.datamodule.prepare_data()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add to the configured callbacks what the summary of a language model shows."""
        trainer = super().instantiate_trainer(**kwargs)
        if _find(trainer, MemoryReport) is None:
            trainer.callbacks.insert(0, MemoryReport())
        if isinstance(self.model, CausalLM):
            if _find(trainer, TokensPerSecond) is None:
                trainer.callbacks.insert(0, TokensPerSecond())
            if isinstance(self.datamodule, TextData):
                trainer.callbacks.insert(0, SampleText(self.datamodule))
        return trainer

    def after_fit(self) -> None:
        """Print the summary, on rank zero."""
        if self.trainer.is_global_zero:
            print("\n".join(summary(self.trainer)), flush=True)


class SampleText(Callback):
    """Writes a continuation when training ends.

    On all ranks, and before the strategy is torn down: a sharded model runs on all of them or on none.
    """

    def __init__(self, data: TextData) -> None:
        self._data = data
        self.text: str | None = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        config = pl_module.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        length = SAMPLE_TOKENS if positions is None else min(SAMPLE_TOKENS, positions - PROMPT_ROOM)
        text = pl_module.generate_text(self._data.encode, self._data.decode, SAMPLE_PROMPT, length)
        self.text = text.split("\0")[0]  # NUL: from there on it is the next document


def summary(trainer: L.Trainer) -> Iterator[str]:
    """Lines on a finished fit: a sample, the validation loss and its references, speed, memory, checkpoint."""
    sample = _find(trainer, SampleText)
    if sample is not None and sample.text is not None:
        yield f"--- the model continues {SAMPLE_PROMPT!r} (sampled, not from the data) ---"
        yield SAMPLE_PROMPT + sample.text
        yield "---"
    loss = trainer.callback_metrics.get("val_nats_per_byte")
    if loss is not None:
        yield f"validation loss: {loss:.3f} nats per byte{_references(trainer.datamodule)}"
    speed = _find(trainer, TokensPerSecond)
    if speed is not None and speed.tokens_per_second is not None:
        yield f"speed: {speed.tokens_per_second:,.0f} tokens/s over {trainer.world_size} process(es)"
    memory = _find(trainer, MemoryReport)
    if memory is not None and memory.text is not None:
        yield memory.text
    for which in ("best", "last"):
        path = getattr(trainer.checkpoint_callback, f"{which}_model_path", "")
        if path:
            yield f"{which} checkpoint: {path}"


def byte_entropies(tokens: np.ndarray) -> tuple[float, float]:
    """Entropy of a byte alone, and given the byte before it, in nats; `tokens` is uint8 [at least 2]."""

    def entropy(counts: np.ndarray) -> float:
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    first, second = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    given = entropy(np.bincount(first))
    return entropy(np.bincount(tokens)), entropy(np.bincount(256 * first + second)) - given


def _references(data: L.LightningDataModule | None) -> str:
    if not isinstance(data, TextData) or data.vocab_size != 256 or len(data.validation_tokens) < 2:
        return ""
    unigram, bigram = byte_entropies(data.validation_tokens[:REFERENCE_TOKENS])
    return f" (its unigram entropy: {unigram:.2f}, bigram: {bigram:.2f})"


def _find(trainer: L.Trainer, kind: type[Callback]) -> Any:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
