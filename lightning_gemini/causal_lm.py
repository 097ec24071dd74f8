"""A Hugging Face causal language model as a LightningModule: from scratch or from a pretrained checkpoint."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_gemini.pretrained import from_pretrained


class CausalLM(L.LightningModule):
    """Trains any causal language model that `transformers` knows.

    Expects batches with `input_ids` and `labels`, both int64 [batch, sequence]. Logs `train_loss` and
    `val_loss` (nats per token) and `val_nats_per_byte`, which compares across tokenizers.

    Args:
        model_type: Architecture to train from scratch: opt, gpt2, llama, qwen3 or any other that
            `transformers` lists under causal language models.
        config: Settings of the Hugging Face configuration to change, such as hidden_size. Special token ids
            are unset unless they are given here: the byte and BPE vocabularies have none of the usual ones.
        pretrained: Name or path of a pretrained checkpoint to start from, instead of model_type. With the gemini
            strategy its weights go from the files into the chunks, and no process ever holds the model.
        vocab_size: Number of token ids. By default the data module's.
        learning_rate: Peak learning rate of AdamW, reached after the warm-up.
        final_learning_rate: Where the cosine decay ends, as a fraction of the peak.
        warmup_steps: Optimizer steps of linear warm-up.
        weight_decay: Decay of weights with two or more dimensions; biases and norms are not decayed.
        betas: AdamW's averaging factors for exp_avg and exp_avg_sq.
        bytes_per_token: Average bytes per token, for `val_nats_per_byte`. By default the data module's;
            without either that metric is left out.
        gradient_checkpointing: Recompute activations in backward: less memory, about a third more compute.
    """

    def __init__(
        self,
        model_type: str = "opt",
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        vocab_size: int | None = None,
        learning_rate: float = 3e-4,
        final_learning_rate: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        bytes_per_token: float | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model_type = model_type
        self.config = config or {}
        self.pretrained = pretrained
        self.vocab_size = vocab_size
        self.learning_rate = learning_rate
        self.final_learning_rate = final_learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.betas = betas
        self.bytes_per_token = bytes_per_token
        self.gradient_checkpointing = gradient_checkpointing
        self.model: PreTrainedModel | None = None

    def setup(self, stage: str) -> None:
        """Take from the data module what was not given."""
        data = self.trainer.datamodule
        if self.vocab_size is None:
            self.vocab_size = getattr(data, "vocab_size", None)
            if "vocab_size" in self.hparams:
                self.hparams["vocab_size"] = self.vocab_size  # a checkpoint then loads without the data
        if self.bytes_per_token is None:
            self.bytes_per_token = getattr(data, "bytes_per_token", None)

    def configure_model(self) -> None:
        """Create the Hugging Face model, once, on the device that the strategy's context names.

        Raises:
            ValueError: the architecture or a setting is unknown, or the model does not fit the data.
        """
        if self.model is not None:
            return
        # The precision plugin's dtype, whatever a checkpoint was saved in.
        dtype = torch.get_default_dtype()
        if self.pretrained is None:
            model = AutoModelForCausalLM.from_config(self._scratch_config(), dtype=dtype)
        else:
            model = from_pretrained(AutoModelForCausalLM, self.pretrained, **self.config, dtype=dtype)
        self._check_fits_data(model.config.get_text_config())
        # A key/value cache is of no use in training; `generate_text` asks for one.
        model.config.use_cache = False
        if self.gradient_checkpointing:
            # transformers renamed it and warns about the old name
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        # from_pretrained leaves evaluation mode on, and Lightning keeps what it finds
        self.model = model.train()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """Logits [batch, sequence, vocab_size]; with labels also the mean loss in nats per token."""
        return self.model(input_ids=input_ids, labels=labels)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(batch["input_ids"], batch["labels"]).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Nats per token of each window, float32 [batch]."""
        logits = self(batch["input_ids"]).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        return nats.mean(dim=1)

    def configure_optimizers(self) -> dict[str, Any]:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.learning_rate, betas=tuple(self.betas)
        )
        factor = self._learning_rate_factor(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def generate_text(
        self,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        prompt: str,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
        seed: int = 0,
    ) -> str:
        """Continue `prompt` by `max_new_tokens` tokens and return the continuation.

        All ranks of a sharded model have to call it alike; the number of tokens never depends on what is
        sampled, so they stay in step. The global random state is left as it was.

        Args:
            encode, decode: Text to token ids and back, as `TextData` has them.
            prompt: Its last tokens are used, as many as the model has positions left for.
            temperature: 0 takes the most likely token each time.
            top_k: Sample among this many most likely tokens.

        Raises:
            ValueError: the prompt is empty, or the model has too few positions.
            RuntimeError: there is no model yet.
        """
        if self.model is None:
            raise RuntimeError("There is no model yet: call configure_model() first (the Trainer does).")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and max_new_tokens >= positions:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be below the model's {positions} positions.")
        ids = list(encode(prompt))[-(positions - max_new_tokens) if positions is not None else 0 :]
        if not ids:
            raise ValueError("The prompt has no tokens; give at least one character to continue.")
        sampling = {"temperature": temperature, "top_k": top_k} if temperature > 0 else {}
        generation = GenerationConfig(
            do_sample=temperature > 0,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            pad_token_id=0,  # nothing is padded, but an unset one is warned about
            use_cache=True,
            **sampling,
        )
        was_training = self.model.training
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            self.model.eval()
            with torch.random.fork_rng(devices=cuda), torch.no_grad():
                torch.manual_seed(seed)
                prompt_ids = torch.tensor([ids], device=self.device)
                output = self.model.generate(
                    prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=generation
                )
        finally:
            self.model.train(was_training)
        return decode(output[0, len(ids) :].tolist())

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        loss = self(batch["input_ids"], batch["labels"]).loss
        windows = len(batch["input_ids"])
        self.log(f"{stage}_loss", loss, prog_bar=True, sync_dist=True, batch_size=windows)
        if self.bytes_per_token is not None:
            nats_per_byte = loss / self.bytes_per_token
            self.log(f"{stage}_nats_per_byte", nats_per_byte, prog_bar=True, sync_dist=True, batch_size=windows)

    def _learning_rate_factor(self, total_steps: float) -> Callable[[int], float]:
        """Learning rate over its peak at each step: linear up, cosine down; flat if the end is unknown."""

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / (self.warmup_steps + 1)
            if math.isinf(total_steps):
                return 1.0
            progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
            cosine = (1 + math.cos(math.pi * progress)) / 2
            return self.final_learning_rate + (1 - self.final_learning_rate) * cosine

        return factor

    def _scratch_config(self) -> PreTrainedConfig:
        known_types = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if self.model_type not in known_types:
            raise ValueError(
                f"model_type={self.model_type!r} is no causal language model of transformers."
                f"{_similar(self.model_type, known_types)} Types are lower-case, such as opt, gpt2 or llama; "
                "for a checkpoint use pretrained."
            )
        default = AutoConfig.for_model(self.model_type)
        # The base class keeps any keyword as an attribute: a misspelled setting would change nothing.
        known = {*default.to_dict(), *default.attribute_map, "attn_implementation"}
        for name in self.config:
            if name not in known:
                raise ValueError(
                    f"config has {name!r}, which is no setting of {type(default).__name__}."
                    f"{_similar(name, sorted(known))}"
                )
        if self.vocab_size is None and "vocab_size" not in self.config:
            raise ValueError("vocab_size is unknown: give it, or use a data module with a `vocab_size`.")
        unset = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return AutoConfig.for_model(self.model_type, **unset | {"vocab_size": self.vocab_size} | self.config)

    def _check_fits_data(self, config: PreTrainedConfig) -> None:
        data = self.trainer.datamodule if self._trainer else None
        vocab_size = getattr(data, "vocab_size", 0)
        if vocab_size > config.vocab_size:
            raise ValueError(
                f"The data has {vocab_size} token ids, the model only {config.vocab_size}: leave vocab_size "
                "at its default, or use the tokenizer that the pretrained model was trained with."
            )
        sequence_length = getattr(data, "sequence_length", 0)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and sequence_length > positions:
            raise ValueError(
                f"The data's sequence_length={sequence_length} is more than the model's "
                f"max_position_embeddings={positions}: raise that in config, or lower sequence_length."
            )


def _similar(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""
