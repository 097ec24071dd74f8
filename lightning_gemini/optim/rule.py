"""What an optimizer does to one element: the interface of the rules, which any kernel can run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule(ABC):
    """One optimizer's arithmetic, element by element.

    A step of a run of parameters that share their state::

        scalars = rule.scalars(group, state)              # counts the step
        states = rule.states(state, shard, torch.float32) # makes what is missing, in the first step
        kernel.update(rule, scalars, Operands(..., states=states))
    """

    @property
    @abstractmethod
    def symbol(self) -> str:
        """The rule's type in ``native.cpp``."""

    @property
    @abstractmethod
    def state_names(self) -> tuple[str, ...]:
        """The state's element-wise tensors, by torch's names."""

    @property
    def counts_steps(self) -> bool:
        """Whether ``state["step"]`` is the number of steps."""
        return False

    @property
    def start(self) -> float:
        """What a state tensor starts with."""
        return 0.0

    @abstractmethod
    def scalars(self, group: Mapping[str, Any], state: dict[str, Any]) -> tuple[float, ...]:
        """This step's hyper-parameters, computed in double as torch does; the first is -1 to maximize, else 1.

        Counts the step in ``state``, as torch does. A state without the rule's tensors is one before its first step.
        """

    @abstractmethod
    def update(
        self, param: Tensor, grad: Tensor, states: Sequence[Tensor], h: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The parameter and the states after the step; changes nothing in place.

        Args:
            param, grad, states: of one shape and dtype, fp32 in all kernels.
            h: the :meth:`scalars` as 0-d tensors of the same dtype and device, so that a schedule never recompiles.
        """

    def states(self, state: dict[str, Any], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The state's tensors in the order of ``state_names``; those missing are made, shaped like ``like``."""
        for name in self.state_names:
            if state.get(name) is None:
                state[name] = torch.full_like(like, self.start, dtype=dtype, requires_grad=False)
        return tuple(state[name] for name in self.state_names)


def sign(group: Mapping[str, Any]) -> float:
    """What gradients are multiplied by to go down."""
    return -1.0 if group.get("maximize") else 1.0


def count_step(state: dict[str, Any]) -> float:
    """Adds one to ``state["step"]``, a 0-d fp32 tensor on the CPU, and returns it; starts at one."""
    step = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device="cpu")
    state["step"] = step.add_(1)
    return step.item()
