"""Lightning's precision modes, as dtypes of chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gemini.core import ConfigurationError, DtypePolicy, Engine

PrecisionMode = Literal["32-true", "bf16-mixed", "bf16-true"]

_POLICIES = {
    "32-true": DtypePolicy(),
    "bf16-mixed": DtypePolicy(torch.bfloat16, master=True, reduce=torch.float32),
    "bf16-true": DtypePolicy(torch.bfloat16),
}


class GeminiPrecision(Precision):
    """The precision plugin of :class:`~lightning_gemini.GeminiStrategy`.

    There is no autocast: parameters are held in the dtype they are computed in, floating-point inputs are cast to it
    once, and ``bf16-mixed`` keeps an fp32 master of each parameter, which is what the optimizer updates.

    Args:
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"bf16-true"``.

    Raises:
        ConfigurationError: it is none of them.
    """

    def __init__(self, precision: PrecisionMode = "32-true") -> None:
        if precision not in _POLICIES:
            raise ConfigurationError(
                f"the gemini strategy supports precision={' or '.join(map(repr, get_args(PrecisionMode)))}, "
                f"got {precision!r}."
            )
        self.precision = precision
        self.policy = _POLICIES[precision]
        self.engine: Engine | None = None

    @classmethod
    def from_plugin(cls, plugin: Precision) -> GeminiPrecision:
        """What Lightning's own plugin for a ``Trainer(precision=...)`` stands for.

        Raises:
            ConfigurationError: it is for a mode that is not supported.
        """
        if isinstance(plugin, GeminiPrecision):
            return plugin
        if type(plugin) in (Precision, HalfPrecision, MixedPrecision):
            return cls(plugin.precision)  # type: ignore[arg-type]
        name = getattr(plugin, "precision", None) or type(plugin).__name__
        return cls(name)  # raises, with the modes that are supported

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        # parameters get their dtype in the chunks
        if self.precision == "bf16-true":
            for owner in module.modules():
                for key, buffer in owner._buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        owner._buffers[key] = buffer.to(torch.bfloat16)
        return module

    @override
    def convert_input(self, data: Any) -> Any:
        if self.policy.compute is None:
            return data
        return apply_to_collection(data, Tensor, lambda t: t.to(self.policy.compute) if t.is_floating_point() else t)

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return _default_dtype(torch.bfloat16) if self.precision == "bf16-true" else nullcontext()

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    @contextmanager
    @override
    def forward_context(self) -> Iterator[None]:
        with self.tensor_init_context():
            yield

    @override
    def backward(self, tensor: Tensor, model: L.LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # here and not around the hooks that Lightning calls before and after: on_after_backward finds gradients reduced
        engine = self._live_engine()
        engine.doubt(tensor)
        with engine.backward():
            super().backward(tensor, model, optimizer, *args, **kwargs)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self._live_engine().clip_grad_norm(_unwrap(optimizer), clip_val)

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self._live_engine().clip_grad_value(_unwrap(optimizer), clip_val)

    def _live_engine(self) -> Engine:
        if self.engine is None:
            raise RuntimeError("there are gradients during fit only: there is no engine yet, or no longer")
        return self.engine


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unwrap(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
