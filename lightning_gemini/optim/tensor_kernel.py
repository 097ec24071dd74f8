"""The rules' tensor code around loads and stores: block by block, or compiled into one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from lightning_gemini.optim.masters import join, low_half, round_to_compute
from lightning_gemini.optim.operands import Operands
from lightning_gemini.optim.rounding import counter, noises, round_randomly
from lightning_gemini.optim.rule import Rule

_EAGER_BLOCK = 2**18  # temporaries of a MiB each: small, and in cache
_COMPILED_BLOCK = 2**30  # what 32-bit indices reach


class TensorKernel:
    """Runs any rule on any device.

    Args:
        compiled: one fused pass by ``torch.compile``, made once for each rule and combination of dtypes. Where that
            fails there is a warning, and operations run one by one from then on.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled
        self._passes: dict[tuple[Any, ...], Callable[..., None]] = {}

    @property
    def name(self) -> str:
        return "compiled" if self._compiled else "eager"

    def prepare(self, rule: Rule) -> bool:
        """Nothing is made before it is needed."""
        return True

    @torch.no_grad()
    def update(self, rule: Rule, scalars: Sequence[float], operands: Operands) -> None:
        """One step of ``rule``, in place; nothing waits for the device."""
        if self._compiled:
            one_pass = self._compiled_pass(rule, operands)
            try:
                for block in _blocks(operands, _COMPILED_BLOCK):
                    one_pass(*_arguments(rule, scalars, block))
            except torch._dynamo.exc.TorchDynamoException as error:  # nothing has run
                self._compiled = False
                warnings.warn(
                    "the optimizer's kernel cannot be compiled and runs operation by operation, several times slower; "
                    f"on a GPU torch.compile needs Triton and a C compiler: {str(error).strip().splitlines()[0]}",
                    stacklevel=2,
                )
        if not self._compiled:
            for block in _blocks(operands, _EAGER_BLOCK):
                _one_pass(*_arguments(rule, scalars, block))

    def square_sum(self, values: Tensor) -> Tensor:
        """The sum of squares, a 0-d fp64 tensor; accumulated in fp64 on the CPU, in fp32 elsewhere."""
        if values.device.type != "cpu":
            norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
            return norm.double().square()
        total = torch.zeros((), dtype=torch.float64)
        for block in values.split(_EAGER_BLOCK):
            wide = block.double()
            total += wide.dot(wide)
        return total

    def _compiled_pass(self, rule: Rule, operands: Operands) -> Callable[..., None]:
        numbers = operands.factor, operands.limit
        tensors = (operands.shard, operands.master, operands.grad, *operands.states[:1], *numbers)
        key = (rule, operands.shard.device.type, *(t.dtype if isinstance(t, Tensor) else None for t in tensors))
        if key not in self._passes:
            # dynamo counts recompilations by code object, and gives up after a few: each pass gets its own
            code = _one_pass.__code__.replace(co_name=f"_one_pass_{len(self._passes)}")
            one_pass = FunctionType(code, _one_pass.__globals__)
            self._passes[key] = torch.compile(one_pass, fullgraph=True, dynamic=True)
        return self._passes[key]


def _blocks(operands: Operands, size: int) -> Iterator[Operands]:
    n = operands.shard.numel()
    if n <= size:
        yield from [operands] if n else []
    else:
        yield from (operands.block(start, start + size) for start in range(0, n, size))


def _arguments(rule: Rule, scalars: Sequence[float], operands: Operands) -> tuple[Any, ...]:
    """What :func:`_one_pass` takes; all numbers in one small tensor on the operands' device."""
    device, factor, limit = operands.shard.device, operands.factor, operands.limit
    known = [0.0 if isinstance(number, Tensor) else number for number in (limit, factor)]
    numbers = [*scalars, *known, 0.0]
    packed = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    packed.view(torch.int32)[-1] = counter(operands.seed, operands.first)
    packed = packed.to(device, non_blocking=True)
    tensors = operands.shard, operands.master, operands.grad, operands.states
    unknown = [number if isinstance(number, Tensor) else None for number in (limit, factor)]
    return rule, *tensors, packed, *unknown


def _one_pass(
    rule: Rule,
    shard: Tensor,
    master: Tensor | None,
    grad: Tensor,
    states: Sequence[Tensor],
    packed: Tensor,
    limit: Tensor | None,
    factor: Tensor | None,
) -> None:
    *h, known_limit, known_factor, _ = packed.unbind()
    limit = known_limit if limit is None else limit
    grad = grad.float() * (known_factor if factor is None else factor)
    grad = torch.clamp(grad, -limit, limit)
    value, new = rule.update(_load(shard, master), grad, [state.float() for state in states], h)
    if states and states[0].dtype == torch.bfloat16:
        counters = torch.arange(shard.numel(), dtype=torch.int32, device=shard.device)
        noise = noises(counters + packed.view(torch.int32)[-1], len(states))
        new = tuple(round_randomly(one, bits) for one, bits in zip(new, noise, strict=True))
    _store(value, shard, master)
    for state, one in zip(states, new, strict=True):
        state.copy_(one)


def _load(shard: Tensor, master: Tensor | None) -> Tensor:
    if master is None:
        return shard.float()
    return join(shard, master) if master.dtype == torch.int16 else master


def _store(value: Tensor, shard: Tensor, master: Tensor | None) -> None:
    if master is None:
        shard.copy_(value)
        return
    round_to_compute(value, shard)
    if master.dtype == torch.int16:
        low_half(value, master)
    else:
        master.copy_(value)
