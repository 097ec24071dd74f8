"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gemini.optim.rule import Rule, count_step, sign


@dataclass(frozen=True)
class Adagrad(Rule):
    """``torch.optim.Adagrad``.

    Sources: Duchi, Hazan and Singer, JMLR 12 (2011); the order of operations is that of
    ``torch.optim.adagrad._single_tensor_adagrad``.
    """

    initial: float = 0.0

    @property
    def symbol(self) -> str:
        return "Adagrad"

    @property
    def counts_steps(self) -> bool:
        return True

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("sum",)

    @property
    def start(self) -> float:
        return self.initial

    def scalars(self, group: Mapping[str, Any], state: dict[str, Any]) -> tuple[float, ...]:
        step = count_step(state)
        lr = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
        return sign(group), float(group["weight_decay"]), float(group["eps"]), -lr

    def update(
        self, param: Tensor, grad: Tensor, states: Sequence[Tensor], h: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        sign, l2, eps, step = h
        grad = torch.addcmul(grad * sign, param, l2)
        total = torch.addcmul(states[0], grad, grad)
        return torch.addcdiv(param, grad * step, total.sqrt() + eps), (total,)
