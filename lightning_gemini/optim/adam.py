"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gemini.optim.rule import Rule, count_step, sign


@dataclass(frozen=True)
class Adam(Rule):
    """``torch.optim.Adam`` and ``AdamW``: decay is decoupled if the group says so.

    Sources: Kingma and Ba, arXiv:1412.6980; Loshchilov and Hutter, arXiv:1711.05101 (AdamW); Reddi, Kale and Kumar,
    arXiv:1904.09237 (``amsgrad``); the order of operations is that of ``torch.optim.adam._single_tensor_adam``.
    """

    amsgrad: bool = False

    @property
    def symbol(self) -> str:
        return "Adam<true>" if self.amsgrad else "Adam<false>"

    @property
    def counts_steps(self) -> bool:
        return True

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg", "exp_avg_sq")

    def scalars(self, group: Mapping[str, Any], state: dict[str, Any]) -> tuple[float, ...]:
        step = count_step(state)
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        beta1, beta2 = group["betas"]
        decoupled = group["decoupled_weight_decay"]
        return (
            sign(group),
            1 - lr * weight_decay if decoupled else 1.0,
            0.0 if decoupled else weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            (1 - beta2**step) ** 0.5,
            float(group["eps"]),
            -lr / (1 - beta1**step),
        )

    def update(
        self, param: Tensor, grad: Tensor, states: Sequence[Tensor], h: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        sign, decay, l2, w1, beta2, w2, root, eps, step = h
        param = param * decay
        grad = torch.addcmul(grad * sign, param, l2)
        mean = torch.lerp(states[0], grad, w1)
        square = torch.addcmul(states[1] * beta2, grad * w2, grad)
        peak = torch.maximum(states[2], square) if self.amsgrad else square
        param = torch.addcdiv(param, mean * step, peak.sqrt() / root + eps)
        return param, (mean, square, peak)[: len(states)]
