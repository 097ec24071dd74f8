"""Lightning's precision modes, as dtypes of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gemini.core import ConfigurationError, DtypePolicy, Engine, UpdatePolicy
from lightning_gemini.optim.loss_scale import LossScale

PrecisionMode = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]

_POLICIES = {
    "32-true": DtypePolicy(),
    "bf16-mixed": DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32),
    "16-mixed": DtypePolicy(torch.float16, master="fp32", reduce=torch.float32),
    "bf16-true": DtypePolicy(torch.bfloat16),
}

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Dtype = Literal["fp32", "bf16", "fp16"]


class GeminiPrecision(Precision):
    """The precision plugin of :class:`~lightning_gemini.GeminiStrategy`.

    Parameters are held in the dtype they are computed in, the floating-point tensors of each batch are cast to it once
    (targets, too), and the mixed modes keep an fp32 master of each parameter, which is what the optimizer updates.

    Args:
        precision: "32-true"; "bf16-mixed" or "16-mixed" (with a dynamic loss scale) for fp32 master weights behind
            parameters of that dtype; "bf16-true" for bf16 without masters.
        master_weights: How masters are kept: "fp32" takes 4 bytes a parameter; "split" 2, because the bf16 parameter
            is the upper half. Both train to the same bits. By default "split" in bf16-mixed, "fp32" in 16-mixed.
        reduce_dtype: In which dtype gradients are averaged over the ranks: "fp32", "bf16" or "fp16"; by default fp32
            in the mixed modes, the parameters' own otherwise.
        state_dtype: "fp32", or "bf16" for optimizer states of half the size, rounded stochastically.
        nonfinite: What a step does whose gradients are NaN or infinite, on all ranks: "raise" names the first
            parameter and ends the run, "skip" warns and goes on. In 16-mixed such steps are always skipped.
        buffer_dtype: What floating-point buffers are cast to: "fp32", "bf16" or "fp16"; by default they keep their
            dtype, except in bf16-true, where they are bf16. Those of batch norms stay fp32 in the mixed modes.
        autocast: Run the forward under torch.autocast as well, as Lightning's DDP and FSDP do: norms, softmax and
            losses are then computed in fp32, at the price of casting what goes into them.
        initial_scale: The first loss scale of 16-mixed, by default 65536.
        growth_factor: What the loss scale is multiplied with after growth_interval steps without an overflow; 2.
        backoff_factor: What the loss scale is multiplied with after an overflow; 0.5.
        growth_interval: Steps without an overflow before the loss scale grows; 2000.
        minimum_scale: The loss scale goes no lower, and an overflow there raises; 1.

    Raises:
        ConfigurationError: A setting that does not exist, makes no sense, or does not go with the mode.
    """

    def __init__(
        self,
        precision: PrecisionMode = "32-true",
        master_weights: Literal["split", "fp32"] | None = None,
        reduce_dtype: Dtype | None = None,
        state_dtype: Literal["fp32", "bf16"] = "fp32",
        nonfinite: Literal["raise", "skip"] = "raise",
        buffer_dtype: Dtype | None = None,
        autocast: bool = False,
        initial_scale: float | None = None,
        growth_factor: float | None = None,
        backoff_factor: float | None = None,
        growth_interval: int | None = None,
        minimum_scale: float | None = None,
    ) -> None:
        if not isinstance(precision, str) or precision not in _POLICIES:
            raise ConfigurationError(
                f"the gemini strategy supports precision={' or '.join(map(repr, get_args(PrecisionMode)))}, "
                f"got {precision!r}."
            )
        self.precision = precision
        policy = _POLICIES[precision]
        if master_weights is not None and policy.master is None:
            raise ConfigurationError(f"master_weights={master_weights!r} is for the mixed modes; {precision} has none.")
        if not isinstance(autocast, bool) or (autocast and policy.compute is None):
            raise ConfigurationError(f"autocast must be True or False, and False in 32-true, got {autocast!r}.")
        self.loss_scale = _loss_scale(
            precision,
            initial_scale=initial_scale,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
            minimum=minimum_scale,
        )
        self.policy = replace(
            policy,
            master=master_weights or policy.master,
            reduce=_dtype("reduce_dtype", reduce_dtype) if reduce_dtype is not None else policy.reduce,
            state=_dtype("state_dtype", state_dtype, ("fp32", "bf16")),
        )
        self.nonfinite = nonfinite
        self.update_policy("at_step")  # raises if there is something wrong with it
        buffers = "bf16" if precision == "bf16-true" and buffer_dtype is None else buffer_dtype
        self._buffer_dtype = None if buffers is None else _dtype("buffer_dtype", buffers)
        self._autocast = autocast
        self.engine: Engine | None = None

    def update_policy(self, when: Literal["at_step", "in_backward"]) -> UpdatePolicy:
        """What the engine is told of updates that are made ``when``.

        Raises:
            ConfigurationError: it does not go with the mode.
        """
        return UpdatePolicy(when, self.nonfinite, self.loss_scale)

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
        if self._buffer_dtype is not None:
            for owner in module.modules():
                if self.policy.master is not None and isinstance(owner, nn.modules.batchnorm._NormBase):
                    continue  # like its parameters
                for key, buffer in owner._buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        owner._buffers[key] = buffer.to(self._buffer_dtype)
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
        try:
            with self.tensor_init_context(), self._cast():
                yield
        except RuntimeError as error:
            if "dtype" in str(error) and self.policy.master is not None and not self._autocast:
                error.add_note(
                    f"precision={self.precision!r} holds parameters in {self.policy.compute}, without autocast: a "
                    "tensor that the model makes itself in fp32 (a buffer, torch.randn) may have met one. "
                    "GeminiPrecision(buffer_dtype=...) casts buffers once, GeminiPrecision(autocast=True) casts "
                    "operands as it goes."
                )
            raise

    def _cast(self) -> AbstractContextManager[Any]:
        if not self._autocast or self.engine is None:
            return nullcontext()
        # without its cache, which would keep copies of weights that are freed
        device = self.engine.store.device.device.type
        return torch.autocast(device, self.policy.compute, cache_enabled=False)

    @override
    def connect(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        trainer = getattr(model, "trainer", None)
        if trainer is not None and getattr(trainer.strategy, "strategy_name", None) != "gemini":
            raise ConfigurationError(
                f"GeminiPrecision works with the gemini strategy, not with {type(trainer.strategy).__name__}. Use "
                "Trainer(strategy='gemini') or Trainer(precision=...)."
            )
        return super().connect(model, optimizers, lr_schedulers)

    @override
    def pre_backward(self, tensor: Tensor, module: L.LightningModule) -> Tensor:
        scaled: Tensor = super().pre_backward(self._live_engine().scale(tensor), module)
        return scaled

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

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.loss_scale is None else self.loss_scale.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.loss_scale is not None and state_dict:
            self.loss_scale.load_state_dict(state_dict)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.loss_scale is not None:  # where Lightning's own plugin for 16-mixed looks for it
            checkpoint[MixedPrecision.__qualname__] = self.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.load_state_dict(checkpoint.get(MixedPrecision.__qualname__, {}))

    def _live_engine(self) -> Engine:
        if self.engine is None:
            raise RuntimeError("there are gradients during fit only: there is no engine yet, or no longer")
        return self.engine


def _dtype(name: str, value: str, choices: Sequence[str] = tuple(_DTYPES)) -> torch.dtype:
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return _DTYPES[value]


def _loss_scale(precision: str, **settings: float | None) -> LossScale | None:
    given = {name: value for name, value in settings.items() if value is not None}
    if precision != "16-mixed":
        if given:
            raise ConfigurationError(f"{', '.join(given)}: there is a loss scale in 16-mixed only, not in {precision}.")
        return None
    try:
        return LossScale(**given)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigurationError(f"GeminiPrecision: {error}") from error


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
