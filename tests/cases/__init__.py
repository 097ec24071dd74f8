"""Models that a user may bring: small, each with a batch and a loss, for comparisons with plain PyTorch."""

from tests.cases import (  # noqa: F401, each registers its cases
    autograd,
    awkward,
    basic,
    checkpointing,
    compiled,
    control,
    hidden,
    refused,
    structure,
    transformers_models,
)
from tests.cases.base import (
    CASES,
    LENGTH,
    REFUSED,
    ROWS,
    VOCAB,
    WIDTH,
    Case,
    adamw,
    batches,
    build,
    case,
    find,
    floats,
    images,
    sequences,
    square,
    tokens,
    train_plain,
)
from tests.cases.basic import Mlp

__all__ = [
    "CASES", "LENGTH", "REFUSED", "ROWS", "VOCAB", "WIDTH", "Case", "Mlp", "adamw", "batches", "build", "case", "find",
    "floats", "images", "sequences", "square", "tokens", "train_plain",
]  # fmt: skip
