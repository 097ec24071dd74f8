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

_KNOWN = (optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad, Lion)


def recognise(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> Rule | None:
    """The rule that does what ``optimizer`` does to the parameters of ``group``; None if there is none.

    There is none for a subclass, which may do anything; where ``foreach`` is set, because who asks for one of torch's
    implementations gets it; for ``capturable`` and ``differentiable``; and for hyper-parameters that only the device
    or autograd knows.
    """
    kind = type(optimizer)
    if kind not in _KNOWN or group.get("foreach") is not None:
        return None
    if group.get("capturable") or group.get("differentiable"):
        return None
    for name, value in group.items():
        if name != "params" and isinstance(value, Tensor) and (value.device.type != "cpu" or value.requires_grad):
            return None
    if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
        return None
    if kind is optim.Adam or kind is optim.AdamW:
        return Adam(amsgrad=bool(group["amsgrad"]))
    if kind is optim.SGD:
        return Sgd(momentum=group["momentum"] != 0)
    if kind is optim.Adagrad:
        return Adagrad(float(optimizer.defaults["initial_accumulator_value"]))  # torch asks no group for it
    return LionRule()
