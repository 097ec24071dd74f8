"""The errors of this package: what was expected, what came, what to do."""

from __future__ import annotations


class GeminiError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(GeminiError, ValueError):
    """A setting, a model or an optimizer that cannot work; raised before training starts."""


class StateError(GeminiError, RuntimeError):
    """An operation that is not allowed in the engine's present state."""


class OutOfBudgetError(GeminiError, MemoryError):
    """Chunks that are needed at the same time do not fit the memory they were given."""


class StepFailedError(OutOfBudgetError):
    """Memory ran out in a step, on this rank or another one; all ranks raise it.

    Weights, masters and optimizer states are as they were before the step, its gradients are dropped, and training can
    go on in the same process, with a smaller batch say.
    """


class DisagreementError(GeminiError, RuntimeError):
    """The ranks do not do the same thing: another model, another order of units, another layout."""


class StaleGraphError(GeminiError, RuntimeError):
    """A backward through a graph whose weights an optimizer step has changed since."""


class PeerError(GeminiError, RuntimeError):
    """Another rank failed, or its connection broke; the message carries what that rank said."""


class HiddenReadError(GeminiError, RuntimeError):
    """A parameter was read in a way that no hook sees, while its values were not there."""


class UpdateError(GeminiError, RuntimeError):
    """An update in the background failed: some chunks have the new weights and others the old ones."""


class NonFiniteError(GeminiError, ArithmeticError):
    """A value that must be finite is NaN or infinite; weights and states are as they were before the step."""


class CheckpointError(GeminiError, RuntimeError):
    """Base of every error about a checkpoint; raised itself where a checkpoint cannot be read or removed."""


class NotACheckpointError(CheckpointError):
    """There is no sharded checkpoint at this path: the message lists what was found, and which tool converts it."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is damaged: flipped bits, a truncated or missing file, files of two saves; names file and tensor."""


class IncompatibleCheckpointError(CheckpointError):
    """A sound checkpoint that does not fit: of another model, optimizer, precision or of a newer version."""


class CheckpointWriteError(CheckpointError):
    """A save failed; all ranks raise it with the same text.

    What was at the path before is there as it was, what the failed save has written is gone, and training can go on.
    ``__cause__`` is what went wrong on the first rank that failed, an :class:`OSError` mostly.
    """


def end_together(error: Exception) -> Exception:
    """``error``, marked as one that ends a step on all ranks: none of them waits for another."""
    error.ended_together = True  # type: ignore[attr-defined]
    return error


def ended_together(error: BaseException) -> bool:
    """Whether all ranks have agreed to end their step because of ``error``, so that they can go on together.

    It is true of every :class:`StepFailedError`, of whatever else one rank raised in such a step, and of the
    :class:`PeerError` that the others raise then.
    """
    return bool(getattr(error, "ended_together", False))
