"""Lion, which torch does not have: the rule, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_gemini.optim.rule import Rule, sign


@dataclass(frozen=True)
class LionRule(Rule):
    """:class:`Lion`'s arithmetic.

    Source: Chen et al., arXiv:2302.06675, algorithm 2; weights decay before the step, as in ``torch.optim.AdamW``.
    """

    @property
    def symbol(self) -> str:
        return "Lion"

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def scalars(self, group: Mapping[str, Any], state: dict[str, Any]) -> tuple[float, ...]:
        lr = float(group["lr"])
        beta1, beta2 = group["betas"]
        return sign(group), 1 - lr * float(group["weight_decay"]), 1 - beta1, 1 - beta2, -lr

    def update(
        self, param: Tensor, grad: Tensor, states: Sequence[Tensor], h: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        sign, decay, w1, w2, step = h
        grad = grad * sign
        direction = torch.lerp(states[0], grad, w1)
        # sign() makes a NaN zero, which would stop the training of an element without a word
        direction = torch.where(direction.isnan(), direction, direction.sign())
        return param * decay + direction * step, (torch.lerp(states[0], grad, w2),)


class Lion(Optimizer):
    """EvoLved Sign Momentum: every element moves by ``lr``, in the direction of an interpolated momentum.

    Source: Chen et al., arXiv:2302.06675, who advise a learning rate 3 to 10 times smaller than AdamW's and a weight
    decay as much larger. One state, ``exp_avg``, in the parameter's dtype; low precisions are computed in fp32.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: the gradient's weight in the direction is ``1 - betas[0]``, in the momentum ``1 - betas[1]``.
        weight_decay: decoupled, times ``lr``.
        maximize: go up.

    Raises:
        ValueError: a negative learning rate or weight decay, a beta outside [0, 1).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"lr is {lr}; it must not be negative")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}; both must be in [0, 1)")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; ``closure`` recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: Mapping[str, Any]) -> None:
        rule, state, grad = LionRule(), self.state[param], param.grad
        if grad is None or grad.is_sparse:
            raise RuntimeError("Lion needs dense gradients")
        dtype = torch.promote_types(param.dtype, torch.float32)
        h = torch.tensor(rule.scalars(group, state), dtype=dtype).to(param.device, non_blocking=True)
        states = rule.states(state, param, param.dtype)
        value, new = rule.update(param.to(dtype), grad.to(dtype), [one.to(dtype) for one in states], h.unbind())
        param.copy_(value)
        for old, one in zip(states, new, strict=True):
            old.copy_(one)
