"""The models that a GPU is measured with: OPT's shapes, how many parameters they have and what a step computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.workload import opt_settings

_GIGA = 1e9


@dataclass(frozen=True)
class Shape:
    """An OPT with tied embeddings and without dropout (Zhang et al., arXiv:2205.01068, table 1).

    Attributes:
        name: what the tables call it.
        layers, width, heads: of the decoder; the feed-forward is four times as wide.
        vocabulary: token ids.
        length: tokens in a sequence.
        checkpointing: whether activations are computed again in the backward, layer by layer.
    """

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int = 50272
    length: int = 2048
    checkpointing: bool = True

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers: twelve matrices of ``width`` by ``width``, their biases and two norms, in each."""
        return self.layers * (12 * self.width**2 + 13 * self.width)

    @property
    def parameters(self) -> int:
        """All parameters; the head is the embedding, and there are two positions more than tokens."""
        return self.layer_parameters + (self.vocabulary + self.length + 2) * self.width + 2 * self.width

    def model_flops(self, tokens: int) -> float:
        """Of the forward and backward of so many tokens: 6 for each parameter, and the attention's 12 x layers x width
        x length, by token (Chowdhery et al., arXiv:2204.02311, appendix B). Nothing is counted twice."""
        return tokens * (6.0 * self.parameters + 12.0 * self.layers * self.width * self.length)

    def least_flops(self, tokens: int) -> float:
        """What has to be computed for it: with the attention's masked half left out, and with what is recomputed."""
        attention = 6.0 * self.layers * self.width * self.length
        again = 2.0 * self.layer_parameters + attention / 3 if self.checkpointing else 0.0
        return tokens * (6.0 * self.parameters + attention + again)

    def build(self) -> nn.Module:
        """The model on the ``meta`` device, in fp32, ready to train."""
        from transformers import OPTConfig, OPTForCausalLM

        config = OPTConfig(**opt_settings(self.layers, self.width, self.heads, self.vocabulary, self.length))
        config.use_cache = False
        with torch.device("meta"):
            model = OPTForCausalLM(config).train()
        if self.checkpointing:  # transformers renamed it and warns about the old name
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        return model

    def batch(self, rows: int, number: int, device: torch.device) -> Tensor:
        """Token ids of micro-batch ``number``, int64 ``[rows, length]``, the same in every process."""
        generator = torch.Generator().manual_seed(number)
        return torch.randint(3, self.vocabulary, (rows, self.length), generator=generator).to(device)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The mean loss in nats per token."""
        return model(input_ids=batch, labels=batch, use_cache=False).loss  # type: ignore[no-any-return]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The layers, which FSDP2 shards one by one."""
        return list(model.model.decoder.layers)  # type: ignore[union-attr, arg-type]


#: The three that are measured; 1.3B is small enough for all of its activations to stay.
SHAPES = {
    "opt-1.3b": Shape("OPT-1.3B", layers=24, width=2048, heads=32, checkpointing=False),
    "opt-6.7b": Shape("OPT-6.7B", layers=32, width=4096, heads=32),
    "opt-13b": Shape("OPT-13B", layers=40, width=5120, heads=40),
}

#: The same in small, for a dry run.
TINY = {
    "opt-1.3b": Shape("tiny-1.3B", 1, 64, 2, vocabulary=512, length=64, checkpointing=False),
    "opt-6.7b": Shape("tiny-6.7B", 2, 64, 2, vocabulary=512, length=64),
    "opt-13b": Shape("tiny-13B", 3, 64, 2, vocabulary=512, length=64),
}


def deep(width_of: Shape, layers: int) -> Shape:
    """``width_of`` with another depth, named by its size."""
    shape = Shape("", layers, width_of.width, width_of.heads, width_of.vocabulary, width_of.length)
    return Shape(f"OPT-{shape.parameters / _GIGA:.3g}B", *tuple(vars(shape).values())[1:])
