"""What is trained: a model, its one batch, and the modules that FSDP2 shards each on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Workload(Protocol):
    """Frozen data that can be sent to another process; builds the same model and batch wherever it is called."""

    def build(self) -> nn.Module: ...

    def batch(self) -> Tensor: ...

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor: ...

    def blocks(self, model: nn.Module) -> list[nn.Module]: ...


def opt_settings(layers: int, width: int, heads: int, vocabulary: int, length: int) -> dict[str, Any]:
    """What transformers' OPTConfig is given: the sizes, and no dropout."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "ffn_dim": 4 * width,
        "num_attention_heads": heads,
        "word_embed_proj_dim": width,
        "max_position_embeddings": length,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }


@dataclass(frozen=True)
class Opt:
    """transformers' OPT with tied embeddings, without dropout; 29.5M parameters as it stands here."""

    layers: int = 6
    width: int = 512
    vocabulary: int = 20480
    length: int = 128
    rows: int = 2

    def build(self) -> nn.Module:
        from transformers import OPTConfig, OPTForCausalLM

        torch.manual_seed(0)
        heads = max(1, self.width // 64)
        config = OPTConfig(**opt_settings(self.layers, self.width, heads, self.vocabulary, self.length))
        return OPTForCausalLM(config).train()

    def batch(self) -> Tensor:
        return torch.randint(3, self.vocabulary, (self.rows, self.length), generator=torch.Generator().manual_seed(1))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch, use_cache=False).loss  # type: ignore[no-any-return]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.model.decoder.layers)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Tower:
    """Small Linears in sequence: next to no arithmetic, so that what is left is what a unit costs."""

    units: int = 200
    width: int = 64
    rows: int = 4

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(self.units)))

    def batch(self) -> Tensor:
        return torch.randn(self.rows, self.width, generator=torch.Generator().manual_seed(1))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()  # type: ignore[no-any-return]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.children())

    def chunk_size(self, units: int) -> int:
        """Elements in a chunk that holds ``units`` Linears and not one more."""
        return units * self.width * (self.width + 1) + 64
