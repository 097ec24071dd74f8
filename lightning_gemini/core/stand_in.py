"""What ``p.grad`` is after a backward: not the gradient, but who says where it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.errors import StateError

_HARMLESS = frozenset(["__get__", "__set__", "__hash__", "size", "dim", "numel", "is_floating_point", "is_complex"])
_GET_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]


class StandIn(Tensor):
    """A tensor of a gradient's form without values; using it raises :class:`StateError` with the remedy.

    Autograd alone may add to it: what it adds is kept aside.
    """

    of: str
    received: Tensor | None
    zeroed: bool

    @staticmethod
    def make(param: nn.Parameter, name: str) -> StandIn:
        made: StandIn = Tensor._make_wrapper_subclass(StandIn, param.shape, dtype=param.dtype, device=param.device)
        made.of, made.received, made.zeroed = name, None, False
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _HARMLESS and func != _GET_DATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in ("zero_", "detach_", "requires_grad_"):  # zero_grad(set_to_none=False)
            args[0].zeroed |= name == "zero_"
            return args[0]
        raise _refusal(args)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch._C._current_graph_task_id() == -1 or not isinstance(args[0], StandIn):
            raise _refusal(args)
        if func is torch.ops.aten.add_.Tensor:
            args[0].received = args[1]
            return args[0]
        if func is torch.ops.aten.add.Tensor:  # with create_graph=True
            args[0].received = args[1]
            return args[1]
        raise _refusal(args)


def _refusal(args: Sequence[Any]) -> StateError:
    flat = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    name = next((item.of for item in flat if isinstance(item, StandIn)), "a parameter")
    return StateError(
        f"the gradient of {name} is not in .grad: gradients are reduced into chunks, and each rank has a part of them. "
        "Clip with Trainer(gradient_clip_val=...) or self.clip_gradients(...), read norms with "
        "trainer.strategy.grad_norm() or grad_norms(), and whole gradients inside "
        "`with trainer.strategy.summon_full_params(with_grads=True):`."
    )


class StandIns:
    """Puts stand-ins into ``p.grad`` after a backward and takes them away before an update.

    What the user does to ``p.grad`` in between counts: a gradient that is dropped (``p.grad = None``,
    ``model.zero_grad()``) is dropped or zeroed, one that is put there is refused.
    """

    def __init__(self, gradients: Sequence[ChunkGradient]) -> None:
        self._gradients = gradients
        self._made: dict[nn.Parameter, StandIn] = {}
        self._placed: dict[nn.Parameter, tuple[ChunkGradient, int]] = {}

    def place(self) -> None:
        """Marks each parameter that has had a gradient."""
        made, placed = self._made, self._placed
        for gradient in self._gradients:
            if not any(gradient.used):
                continue
            for slot, param in enumerate(gradient.chunk.params):
                if gradient.used[slot] and param not in placed:
                    stand_in = made.get(param)
                    if stand_in is None:
                        stand_in = made[param] = StandIn.make(param, gradient.chunk.names[slot])
                    param.grad = stand_in
                    placed[param] = gradient, slot

    def received(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        """The gradient that autograd has just left in ``p.grad``; a stand-in may have been there."""
        if not self._placed or (place := self._placed.pop(param, None)) is None:
            return grad
        stand_in = self._made[param]
        received, stand_in.received = stand_in.received, None
        if received is None:
            place[0].drop(place[1])  # the gradient before, which the user has taken away
            return grad
        self._zero(stand_in, *place)
        return received

    def take(self) -> None:
        """Takes them away.

        Raises:
            StateError: the user has put a gradient of their own in the place of one.
        """
        placed, self._placed = self._placed, {}
        for param, (gradient, slot) in placed.items():
            if param.grad is None:
                gradient.drop(slot)
            elif type(param.grad) is StandIn:
                self._zero(param.grad, gradient, slot)
                param.grad = None
        own = []
        for gradient in self._gradients:
            for slot, param in enumerate(gradient.chunk.params):
                if param.grad is not None:
                    own.append(gradient.chunk.names[slot])
                    param.grad = None
        if own:
            raise StateError(
                f"{', '.join(own[:3])}{' and others' if len(own) > 3 else ''}: .grad was set by hand, but the "
                "optimizer takes gradients from the chunks. Change the loss instead, or scale it."
            )

    def _zero(self, stand_in: StandIn, gradient: ChunkGradient, slot: int) -> None:
        if stand_in.zeroed:
            stand_in.zeroed = False
            gradient.zero(slot)

    def forget(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Takes them, or those of ``params``, away whatever has become of them."""
        for param in list(self._placed) if params is None else params:
            if self._placed.pop(param, None) is not None:
                param.grad = None
