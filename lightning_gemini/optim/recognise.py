"""Which optimizers have a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, optim

from lightning_gemini.optim.adagrad import Adagrad
from lightning_gemini.optim.adam import Adam
from lightning_gemini.optim.lion import Lion, LionRule
from lightning_gemini.optim.rule import Rule
from lightning_gemini.optim.sgd import Sgd


def recognise(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> Rule | None:
    """The rule that does what ``optimizer`` does to the parameters of ``group``; None if there is none.

    There is none for a subclass, which may do anything; where ``foreach`` is set, because who asks for one of torch's
    implementations gets it; for ``capturable`` and ``differentiable``; and for hyper-parameters that only the device
    or autograd knows.
    """
    if group.get("foreach") is not None or group.get("capturable") or group.get("differentiable"):
        return None
    tensors = [value for name, value in group.items() if name != "params" and isinstance(value, Tensor)]
    if any(value.device.type != "cpu" or value.requires_grad for value in tensors):
        return None
    if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
        return None
    kind = type(optimizer)
    if kind is optim.Adam or kind is optim.AdamW:
        return Adam(amsgrad=bool(group["amsgrad"]))
    if kind is optim.SGD:
        return Sgd(momentum=group["momentum"] != 0)
    if kind is optim.Adagrad:
        return Adagrad(float(optimizer.defaults["initial_accumulator_value"]))  # torch asks no group for it
    return LionRule() if kind is Lion else None
