"""Reads that nothing announces: weights in a Python list, ``for p in self.parameters()``, ``functional_call``.

NOTE: how they are found.
No hook and no attribute of ours lies on the way of such a parameter to the operation that reads it, and what it holds
while its chunk is free is NaN. A TorchFunctionMode sees every operation and its arguments, and can make them usable
first, but costs a few microseconds for each. So it watches evaluations, the first training step and the first backward;
if nothing was hidden there it stays off in training, until somebody lists parameters inside a step. What it would then
still miss mostly fails the step: autograd saves the placeholder (see ``access``), or the loss is not finite; the next
step is watched again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import CompileContext
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from lightning_gemini.core.chunk import Chunk
from lightning_gemini.core.errors import NonFiniteError
from lightning_gemini.core.use import Uses

#: Functions that look at a tensor's form and not at its values; their names are the same on Tensor and in torch.
_LOOKS_ONLY = frozenset(
    {"__hash__", "__len__", "__repr__", "__set__", "__deepcopy__", "__reduce_ex__"}
    | {"size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"}
    | {"is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_neg", "is_conj"}
    | {"is_shared", "is_pinned", "data_ptr", "untyped_storage", "result_type", "requires_grad_"}
    | {"grad", "backward"}  # of torch.autograd
    | {"register_hook", "register_post_accumulate_grad_hook"}
    | {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided"}
    | {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
)
_GETTERS_OF_VALUES = frozenset(
    getattr(Tensor, name).__get__
    for name in ("data", "T", "mT", "H", "mH", "real", "imag")  # each an alias
)


class HiddenReads:
    """Watches for them, serves them and remembers their names.

    Args:
        uses: pins chunks.
        names: the managed parameters' names.
        always: whether to watch every step.

    Attributes:
        found: the names of the parameters that were read unannounced, in the order of their first reads.
    """

    def __init__(self, uses: Uses, names: Mapping[nn.Parameter, tuple[int, str]], always: bool) -> None:
        self._uses = uses
        self._names = names
        self._always = always
        self._calm: dict[str, bool] = {}  # by kind of step: whether its watched steps had nothing to hide
        self._scope: ExitStack | None = None  # of the step under way
        self._depth = 0  # of torch's stack of modes, where the step began
        self._watched = True  # the step under way, or the last one
        self._doubts: list[Tensor] = []
        self.found: dict[str, None] = {}

    @contextmanager
    def watch(self, kind: str) -> Iterator[None]:
        """Around a step of some kind; watches if there is a reason, or when there comes one."""
        if self._scope is not None:
            yield
            return
        before, calm = len(self.found), self._calm.get(kind, False)
        with ExitStack() as self._scope:
            self._scope.callback(self._close)
            self._depth = torch._C._len_torch_function_stack()
            self._watched = False
            if self._always or not calm or not torch.is_grad_enabled():
                self._begin()
            yield
        if calm or self._always:
            return
        news = len(self.found) > before
        self._calm[kind] = not news and (kind not in self._calm or not self.found)
        if news:
            names = ", ".join(list(self.found)[:3]) + (" and others" if len(self.found) > 3 else "")
            warnings.warn(
                f"{names}: read in a way that no hook sees, such as a loop over self.parameters() or a weight kept in "
                f"a list. Every {kind} is watched for such reads from now on, which takes a few microseconds an "
                "operation; a read through the module (self.layer.weight) takes none.",
                stacklevel=2,
            )

    def listed(self) -> None:
        """Somebody lists the parameters of a module: in a step that is not watched, what follows is."""
        if self._scope is None or self._watched or self._depth != torch._C._len_torch_function_stack():
            return
        if CompileContext.try_get() is None:  # not Dynamo, which looks while it traces
            self._begin()

    def _begin(self) -> None:
        assert self._scope is not None
        self._watched = True
        self._scope.enter_context(_Watch(self))

    def _close(self) -> None:
        self._scope = None

    def doubt(self, loss: Tensor) -> None:
        """Notes the loss of a step: if it is not finite, :meth:`settle` raises. A watched step is above doubt."""
        if not self._watched:
            self._doubts.append(loss.detach().isfinite().all())

    def settle(self, skips: bool) -> None:
        """Before an update; waits for the device if there is a loss to look at.

        Args:
            skips: whether a step that is not finite is skipped: then the next one is watched, and this one goes on.

        Raises:
            NonFiniteError: a loss was not finite though no step of its kind was watched; the next one will be.
        """
        doubts, self._doubts = self._doubts, []
        if doubts and not bool(torch.stack(doubts).all()):
            self.suspect()
            if skips:
                return
            raise NonFiniteError(
                "the loss is not finite, in a step that freed parameters after their use. Either training diverged, or "
                "a parameter was read in a way that no hook sees while it held NaN. The weights are unchanged. Run "
                "with check=True: then every such read is served and named, and a loss that is still not finite is "
                "the model's own."
            )

    def suspect(self) -> None:
        """Watches the next step of every kind."""
        self._calm.clear()
        self._doubts.clear()

    def pause(self) -> AbstractContextManager[Any]:
        """Around a compiled module, whose graph a mode would split."""
        return _pop_mode_temporarily() if self._scope is not None and self._watched else nullcontext()

    def borrow(self, param: nn.Parameter) -> Chunk | None:
        """Makes a parameter usable for one operation, if nobody has done so."""
        index, name = self._names[param]
        chunk = self._uses.borrow(index, name)
        if chunk is not None:
            self.found[name] = None
        return chunk

    def give_back(self, chunk: Chunk, result: Any) -> None:
        """The operation is over; if its result is an alias of the chunk, the chunk stays until the step ends."""
        storage = chunk.full.untyped_storage()._cdata
        results = result if isinstance(result, (tuple, list)) else (result,)
        self._uses.give_back(chunk, keep=any(_may_alias(r, storage) for r in results))

    def managed(self, value: Any) -> nn.Parameter | None:
        """The managed parameter that ``value`` is, also inside vmap and the like."""
        while isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
            value = torch._C._functorch.get_unwrapped(value)
        return value if type(value) is nn.Parameter and value in self._names else None


def _may_alias(result: Any, storage: int) -> bool:
    if not isinstance(result, Tensor):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(result):
        return True  # it does not say
    try:
        return bool(result.untyped_storage()._cdata == storage)
    except (RuntimeError, NotImplementedError):
        return False  # sparse, or a subclass


class _Watch(TorchFunctionMode):
    def __init__(self, reads: HiddenReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _LOOKS_ONLY or (name == "__get__" and func not in _GETTERS_OF_VALUES):
            return func(*args, **kwargs)
        borrowed: list[Chunk] = []
        result = None
        try:
            for value in (*args, *kwargs.values()):
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    param = self._reads.managed(item)
                    if param is not None and (chunk := self._reads.borrow(param)) is not None:
                        borrowed.append(chunk)
            result = func(*args, **kwargs)
        finally:
            for chunk in borrowed:
                self._reads.give_back(chunk, result)
        return result
