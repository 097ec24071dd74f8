"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gemini.optim.rule import Rule, sign


@dataclass(frozen=True)
class Sgd(Rule):
    """``torch.optim.SGD``, whose momentum buffer starts as the gradient, whatever ``dampening`` is.

    Sources: Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013); the
    order of operations is that of ``torch.optim.sgd._single_tensor_sgd``.
    """

    momentum: bool = False

    @property
    def symbol(self) -> str:
        return "Sgd<true>" if self.momentum else "Sgd<false>"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def scalars(self, group: Mapping[str, Any], state: dict[str, Any]) -> tuple[float, ...]:
        momentum = float(group["momentum"])
        first = state.get("momentum_buffer") is None
        return (
            sign(group),
            float(group["weight_decay"]),
            momentum,
            1.0 if first else 1 - group["dampening"],
            1.0 if group["nesterov"] else 0.0,
            momentum if group["nesterov"] else 1.0,
            -float(group["lr"]),
        )

    def update(
        self, param: Tensor, grad: Tensor, states: Sequence[Tensor], h: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        sign, l2, keep, take, direct, buffered, step = h
        grad = torch.addcmul(grad * sign, param, l2)
        if not self.momentum:
            return torch.addcmul(param, grad, step), ()
        buffer = torch.addcmul(states[0] * keep, grad, take)
        return torch.addcmul(param, torch.addcmul(grad * direct, buffer, buffered), step), (buffer,)
