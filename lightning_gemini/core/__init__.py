"""The engine: chunks of parameters, sharded over ranks and moved on demand. Imports torch alone."""

from lightning_gemini.core.chunk import Chunk, ChunkState, Home
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.engine import Engine
from lightning_gemini.core.errors import (
    CheckpointError,
    CheckpointWriteError,
    ConfigurationError,
    CorruptCheckpointError,
    DisagreementError,
    GeminiError,
    HiddenReadError,
    IncompatibleCheckpointError,
    NonFiniteError,
    NotACheckpointError,
    OutOfBudgetError,
    PeerError,
    StaleGraphError,
    StateError,
    StepFailedError,
    UpdateError,
)
from lightning_gemini.core.layout import Layout, ParamSpec, plan_layout
from lightning_gemini.core.shard import shard
from lightning_gemini.core.update_policy import UpdatePolicy

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "Chunk",
    "ChunkState",
    "ConfigurationError",
    "CorruptCheckpointError",
    "DisagreementError",
    "DtypePolicy",
    "Engine",
    "GeminiError",
    "HiddenReadError",
    "Home",
    "IncompatibleCheckpointError",
    "Layout",
    "NonFiniteError",
    "NotACheckpointError",
    "OutOfBudgetError",
    "ParamSpec",
    "PeerError",
    "StaleGraphError",
    "StateError",
    "StepFailedError",
    "UpdateError",
    "UpdatePolicy",
    "plan_layout",
    "shard",
]
