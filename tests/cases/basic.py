"""Plain models: what torch.nn has."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.base import ROWS, VOCAB, WIDTH, case, images, seeded, sequences, tokens


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


@case(sequences, lambda model, batch: model(batch)[0].square().mean())
def gru() -> nn.Module:
    return nn.GRU(WIDTH, 16, num_layers=2, bidirectional=True, batch_first=True)


@case(sequences, lambda model, batch: model(batch, batch.flip(1)[:, :4]).square().mean())
def encoder_decoder() -> nn.Module:
    return nn.Transformer(WIDTH, 4, 1, 2, 64, dropout=0.0, batch_first=True)


@case()
class LstmCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(WIDTH, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for _ in range(3):
            state = self.cell(x, state)
        return self.head(state[0])


@case(sequences)
class PackedLstm(nn.Module):
    """A packed sequence goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(WIDTH, WIDTH), nn.LSTM(WIDTH, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.first(x), torch.tensor([6, 4, 3, 1]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


@case(images)
class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.PReLU(8),
            nn.ConvTranspose2d(8, 8, 2, groups=2, bias=False),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.GELU(), nn.Flatten(),
            nn.BatchNorm1d(392, affine=False), nn.RMSNorm(392), nn.Linear(392, 6),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@case()
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair = nn.Linear(WIDTH, 8), nn.Bilinear(8, 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.pair(x, x.tanh())


@case(tokens)
class Embeddings(nn.Module):
    """A bag, and rows that get no gradient: of the padding, and those that are not looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCAB, WIDTH, mode="mean")
        self.padded = nn.Embedding(VOCAB, WIDTH, padding_idx=7)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x < 20, 7, x)
        return self.head(self.bag(x) + self.padded(x).sum(1).tanh())


@case()
class Containers(nn.Module):
    """``ParameterList``, ``ParameterDict`` and ``ModuleDict``."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(WIDTH, WIDTH) / 6 for _ in range(3)])
        self.named = nn.ParameterDict({"scale": torch.ones(WIDTH), "shift": torch.zeros(WIDTH)})
        self.ways = nn.ModuleDict({"tanh": nn.Linear(WIDTH, WIDTH), "relu": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + (x @ weight).tanh()
        x = x * self.named["scale"] + self.weights[1].mean()
        for name, way in self.ways.items():
            x = getattr(torch, name)(way(x))
        return x + dict(self.named.items())["shift"]


@case()
class Buffers(nn.Module):
    """Changed in place, replaced, counted, not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("largest", torch.zeros(()), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1)
            self.largest = torch.maximum(self.largest, x.max())
            self.seen += len(x)
        return self.last((x - self.mean) / (self.largest + 1)) / self.seen


@case(loss=seeded)
class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.ReLU()) for _ in range(3))
        self.body = nn.Sequential(*blocks, nn.Linear(WIDTH, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.rand_like(x))


@case(sequences, seeded)
def transformer_with_dropout() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.2, batch_first=True, bias=False)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


# Reparametrized weights


@case()
def weight_norm() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        nn.Tanh(),
        nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), orthogonal_map="cayley"),
        nn.Tanh(),
        nn.Linear(WIDTH, 8),
    )


@case()
def spectral_norm() -> nn.Module:
    """A buffer changes in each forward."""
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh(), norm(nn.Linear(WIDTH, 8)))


@case()
def old_weight_norm() -> nn.Module:
    """A forward pre-hook computes the weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(
            nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)),
            nn.Tanh(),
            nn.utils.weight_norm(nn.Linear(WIDTH, 8), dim=None),
        )


@case()
def old_spectral_norm() -> nn.Module:
    norm = nn.utils.spectral_norm
    return nn.Sequential(norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh(), norm(nn.Linear(WIDTH, 8)))


@case()
def old_weight_norm_recurrent() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _First(nn.utils.weight_norm(nn.GRU(WIDTH, 16), "weight_hh_l0"))


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Tensor:
        return self.inner(x)[0]


class _Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((WIDTH,), 2.0))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@case(tokens, lambda model, batch: F.cross_entropy(model(batch).flatten(0, 1), batch.flatten()))
class ParametrizedSharedWeight(nn.Module):
    """The head is the embedding's weight, as its parametrization makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(VOCAB, WIDTH), Mlp()
        nn.utils.parametrize.register_parametrization(self.embed, "weight", _Doubled())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(self.embed(x)), self.embed.weight)


@case()
class ParametrizedCached(nn.Module):
    """One computation of the weight for several uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(WIDTH, WIDTH), Mlp()
        nn.utils.parametrize.register_parametrization(self.layer, "weight", _Doubled())

    def forward(self, x: Tensor) -> Tensor:
        with nn.utils.parametrize.cached():
            for _ in range(3):
                x = self.other(self.layer(x).tanh())
        return x
