"""Models that a user may bring: small, each with a batch and a loss, for comparisons with plain PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, ROWS, VOCAB, LENGTH = 32, 4, 96, 12


@dataclasses.dataclass
class Case:
    """A model and how to train it.

    Attributes:
        build: makes the model; the RNG is seeded before.
        batch: makes one rank's batch from a generator.
        loss: model and batch -> scalar.
        groups: model -> what the optimizer is given; all parameters if ``None``.
        options: for ``shard``.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    groups: Callable[[nn.Module], Any] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES: dict[str, Case] = {}


def floats(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=generator)


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)


def images(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, 3, 8, 8, generator=generator)


def square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).float().square().mean()


def case(
    batch: Callable[[torch.Generator], Any] = floats,
    loss: Callable[[nn.Module, Any], Tensor] = square,
    **rest: Any,
):
    """Registers a module class, or a function that makes a model, under its name."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[build.__name__] = Case(build, batch, loss, **rest)
        return build

    return register


# Plain models


@case()
class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, WIDTH)) for _ in range(4))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@case(
    groups=lambda model: [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.003},
    ]
)
class MlpInGroups(Mlp):
    """Decay and no decay: parameters of two groups take turns."""


@case(images)
class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            # no bias before a BatchNorm: its gradient is nothing but rounding, which Adam would blow up
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, stride=2, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(12 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


@case(images)
def channels_last() -> nn.Module:
    return ConvNet().to(memory_format=torch.channels_last)


@case(lambda g: torch.randn(6, ROWS, WIDTH, generator=g), lambda model, batch: model(batch)[0].square().mean())
def lstm() -> nn.Module:
    return nn.LSTM(WIDTH, 16, num_layers=2, bidirectional=True)


@case(lambda g: torch.randn(ROWS, 6, WIDTH, generator=g))
def torch_transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


# What hooks alone get wrong (each was wrong in some design that was tried)


@case(
    lambda g: torch.randn(ROWS, 6, WIDTH, generator=g),
    lambda model, batch: model(batch, batch, batch)[0].square().mean(),
)
def attention() -> nn.Module:
    """Reads the weight of its child ``out_proj``."""
    return nn.MultiheadAttention(WIDTH, 4, batch_first=True)


@case(tokens, lambda model, batch: F.cross_entropy(model(batch).flatten(0, 1), batch.flatten()))
class BorrowedWeight(nn.Module):
    """The root uses the embedding's weight as its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = Mlp()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.embed.weight  # held while other units run
        return F.linear(self.norm(self.body(self.embed(x))), weight)


@case(tokens, lambda model, batch: F.cross_entropy(model(batch).flatten(0, 1), batch.flatten()))
class TiedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = Mlp()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))


class _TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def decode(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


@case()
class OtherMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coder, self.body = _TwoWays(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.coder.decode(self.body(self.coder(x)))


@case()
class BareRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.body = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.scale) + self.shift * self.scale


@case()
def user_hooks() -> nn.Module:
    """A user's forward hooks that read weights, before and after."""
    model = Mlp()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: (args[0] + m.weight.mean(),))
            module.register_forward_hook(lambda m, args, out: out * (1 + m.bias.mean()))
    return model


@dataclasses.dataclass
class _Output:
    value: Tensor
    extra: Any = None


class _DataclassBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> _Output:
        return _Output(x + self.b(self.a(x).tanh()), {"nested": [None, (x,)]})


@case()
class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_DataclassBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).value
        return x


class _SideBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> None:
        self.kept = (x @ self.weight).tanh()


@case()
class SideChannel(nn.Module):
    """Outputs that no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_SideBlock() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block(x)
            x = x + block.kept
            block.kept = None
        return x


def _penalised(model: nn.Module, batch: Tensor) -> Tensor:
    x = batch.clone().requires_grad_()
    out = model(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().mean() + gradient.square().mean()


@case(loss=_penalised)
class GradientPenalty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class _Quantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + (self.weight.mul(8).round().div(8) - self.weight).detach()
        return F.linear(x, weight, self.bias)


@case()
def straight_through() -> nn.Module:
    return nn.Sequential(_Quantized(WIDTH, WIDTH), nn.ReLU(), _Quantized(WIDTH, WIDTH), nn.ReLU(), _Quantized(WIDTH, 8))


@case()
class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x).tanh() + self.between(x)
        return x


class _FrozenWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).tanh()


@case()
def bias_beside_frozen() -> nn.Module:
    """Releasing a unit when its gradients are in would free the frozen weight too early."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(_FrozenWeight() for _ in range(4)))


@case()
class FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Mlp(), nn.Linear(WIDTH, 8)
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@case()
class FrozenMiddle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = Mlp(), Mlp(), nn.Linear(WIDTH, 8)
        self.middle.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


@case()
class Unused(nn.Module):
    """Parameters that get a gradient never, or not at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.never, self.sometimes = Mlp(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.body(x)
        return self.sometimes(x) if self.calls % 3 == 0 else x


@case()
class OddShapes(nn.Module):
    """0-d, empty, larger than a chunk, of which a view was registered."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 7))
        self.one = nn.Parameter(torch.ones(1))
        self.large = nn.Linear(WIDTH, 400)
        self.strided = nn.Parameter(torch.randn(WIDTH, 800)[:, ::2] / 20)
        self.transposed = nn.Parameter((torch.randn(8, 400) / 20).t())

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + x @ self.strided * self.scalar
        return y.tanh() @ self.transposed * self.one + self.empty.sum()


@case()
class MixedDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.c = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).double()).bfloat16()).float()


@case()
class ComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix = (
            nn.Linear(WIDTH, WIDTH),
            nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.mix, n=WIDTH)


@case()
def weight_norm() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        nn.Tanh(),
        nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), orthogonal_map="cayley"),
        nn.Tanh(),
        nn.Linear(WIDTH, 8),
    )


class _Custom(torch.autograd.Function):
    """Keeps the raw weight outside ``save_for_backward``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad @ ctx.weight.t(), x.t() @ grad


class _CustomBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return _Custom.apply(x, self.weight).tanh()


@case()
def custom_function() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(_CustomBlock() for _ in range(4)))


# Checkpointing


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks, self.last = (
            nn.Linear(WIDTH, WIDTH),
            nn.ModuleList(blocks),
            nn.Linear(WIDTH, 8),
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


@case()
def checkpoint_reentrant() -> nn.Module:
    return _Checkpointed(True, [Mlp() for _ in range(3)])


@case()
def checkpoint_nonreentrant() -> nn.Module:
    return _Checkpointed(False, [Mlp() for _ in range(3)])


@case()
def checkpoint_shared_reentrant() -> nn.Module:
    """One module in three checkpoints: its gradient comes in three parts."""
    shared = Mlp()
    return _Checkpointed(True, [shared, Mlp(), shared, shared])


@case()
def checkpoint_shared_nonreentrant() -> nn.Module:
    shared = Mlp()
    return _Checkpointed(False, [shared, Mlp(), shared, shared])


class _ReadsChild(nn.Module):
    """Owns nothing and reads a child's weight: inside a checkpoint no unit announces that."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.other(x).tanh(), self.child.weight) + self.child.bias


@case()
def checkpoint_borrowed() -> nn.Module:
    return _Checkpointed(False, [_ReadsChild() for _ in range(3)])


@case()
def checkpoint_borrowed_reentrant() -> nn.Module:
    return _Checkpointed(True, [_ReadsChild() for _ in range(3)])


@case()
def checkpoint_frozen() -> nn.Module:
    model = _Checkpointed(False, [Mlp() for _ in range(3)])
    model.blocks.requires_grad_(False)
    return model


@case()
def checkpoint_custom() -> nn.Module:
    return _Checkpointed(False, [nn.Sequential(_CustomBlock(), _CustomBlock()) for _ in range(3)])


# Hugging Face


def _lm_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


@case(tokens, _lm_loss)
def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            ffn_dim=64,
            num_attention_heads=4,
            word_embed_proj_dim=WIDTH,
            max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


@case(tokens, _lm_loss)
def llama() -> nn.Module:
    return _llama()


@case(tokens, _lm_loss)
def llama_checkpoint() -> nn.Module:
    model = _llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@case(tokens, _lm_loss)
def llama_checkpoint_reentrant() -> nn.Module:
    model = _llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return model.train()


@case(tokens, _lm_loss)
def opt_cached() -> nn.Module:
    """Keeps the key-value cache: an output that is neither a tensor nor a container."""
    model = CASES["opt"].build()
    model.config.use_cache = True
    return model


@case(tokens, lambda model, batch: model(input_ids=batch, labels=batch).loss)
def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


@case(tokens, lambda model, batch: model(input_ids=batch, labels=batch).loss)
def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


@case(tokens, _lm_loss, options={"unit_modules": ["OPTDecoderLayer"]})
def opt_by_layer() -> nn.Module:
    return CASES["opt"].build()


# Running them


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].build().train()


def batches(name: str, steps: int, ranks: int) -> list[list[Any]]:
    """``[step][rank]``, the same wherever it is called."""
    generator = torch.Generator().manual_seed(1)
    return [[CASES[name].batch(generator) for _ in range(ranks)] for _ in range(steps)]


def adamw(name: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    groups = CASES[name].groups
    return torch.optim.AdamW(groups(model) if groups else model.parameters(), lr=0.01, weight_decay=0.05, **settings)


def train_plain(name: str, steps: int, ranks: int) -> tuple[list[float], nn.Module, torch.optim.Optimizer]:
    """What ranks with averaged gradients compute, in one process: rank 0's losses, model, optimizer."""
    model = build(name)
    optimizer = adamw(name, model)
    losses = []
    for step in batches(name, steps, ranks):
        buffers = [b.clone() for b in model.buffers()]
        attributes = {m: dict(vars(m)) for m in model.modules() if hasattr(m, "calls")}
        after: list[Tensor] = []
        for rank, batch in enumerate(step):
            if rank:  # each rank has buffers and attributes of its own
                for buffer, value in zip(model.buffers(), buffers, strict=True):
                    buffer.data.copy_(value)
                for module, values in attributes.items():
                    module.calls = values["calls"]
            loss = CASES[name].loss(model, batch)
            (loss / ranks).backward()
            if not rank:
                losses.append(loss.item())
                after = [b.clone() for b in model.buffers()]
        for buffer, value in zip(model.buffers(), after, strict=True):
            buffer.data.copy_(value)
        optimizer.step()
        optimizer.zero_grad()
    return losses, model, optimizer
