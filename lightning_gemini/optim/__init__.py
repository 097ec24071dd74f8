"""Update rules, the kernels that run them, and master weights: the lowest room."""

from lightning_gemini.optim.lion import Lion

__all__ = ["Lion"]
