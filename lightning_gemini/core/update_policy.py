"""When updates are made, and which gradients are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.optim.loss_scale import LossScale

UpdateTime = Literal["at_step", "in_backward"]
NonFinite = Literal["raise", "skip"]


@dataclass(frozen=True)
class UpdatePolicy:
    """How gradients become updates.

    Attributes:
        when: ``"at_step"``, or ``"in_backward"``: each chunk as soon as its gradient is reduced, so that no gradient
            waits for the step. That takes 2 bytes per parameter less, and rules out whatever has to know all gradients
            before the first update: clipping, skipping and accumulating.
        nonfinite: what a step does whose gradients are not finite, on all ranks: it raises or is skipped.
        loss_scale: for fp16; steps that overflow are skipped, and the scale adapts.
        overlap: whether chunks whose home is host memory are updated in the background; the bits are the same.

    Raises:
        ConfigurationError: these do not go together.
    """

    when: UpdateTime = "at_step"
    nonfinite: NonFinite = "raise"
    loss_scale: LossScale | None = None
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.when not in ("at_step", "in_backward"):
            raise ConfigurationError(f"update must be 'at_step' or 'in_backward', got {self.when!r}.")
        if self.nonfinite not in ("raise", "skip"):
            raise ConfigurationError(f"nonfinite must be 'raise' or 'skip', got {self.nonfinite!r}.")
        if self.when == "in_backward" and self.skips:
            what = "a loss scale (16-mixed)" if self.loss_scale is not None else "nonfinite='skip'"
            raise ConfigurationError(
                f"update='in_backward' cannot work with {what}: whether a step is skipped is known when the last "
                "gradient is there, and by then the first ones have been used. Use update='at_step', or bf16-mixed "
                "with nonfinite='raise'."
            )

    @property
    def skips(self) -> bool:
        """Whether steps whose gradients are not finite are skipped."""
        return self.loss_scale is not None or self.nonfinite == "skip"
