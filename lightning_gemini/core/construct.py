"""Fills the chunks: from a model that was built, or by initialising one that was not, parameter by parameter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gemini.core.adapters import initialise_adapters
from lightning_gemini.core.chunk import placeholder
from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.store import Store

_GET_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class WeightSource(Protocol):
    """Where parameters get their values from, when there are chunks: a checkpoint, or a folder of pretrained weights.

    Attributes:
        params: that it fills; they may be on ``meta``, or placeholders.
    """

    params: Collection[nn.Parameter]

    def fill(self, store: Store, index_of: Mapping[nn.Parameter, int]) -> None:
        """Writes the values into the chunks, all ranks together; none of them needs to hold the whole."""


def leave_meta(root: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Turns parameters on ``meta`` into shape-only placeholders on ``device``, so that optimizers accept them.

    The parameter objects stay the same.

    Returns:
        the parameters that were on ``meta`` and have no values yet.
    """
    unbuilt = {param for param in root.parameters() if param.is_meta}
    _exchange(root, unbuilt, lambda param: placeholder(param.shape, param.dtype, device))
    return unbuilt


def return_to_meta(root: nn.Module, unbuilt: set[nn.Parameter]) -> None:
    """Undoes :func:`leave_meta`, for a model that could not be laid out."""
    _exchange(root, unbuilt, lambda param: torch.empty_like(param, device="meta"))


def leave_meta_to_load(root: nn.Module, names: Collection[str]) -> None:
    """Gives parameters and buffers on ``meta`` memory of the host, which ``load_state_dict`` is about to fill."""
    params = {param for name, param in root.named_parameters(remove_duplicate=False) if name in names and param.is_meta}
    _exchange(root, params, lambda param: torch.empty_like(param, device="cpu"))
    for path, module in root.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and (f"{path}.{key}" if path else key) in names:
                module._buffers[key] = torch.empty_like(buffer, device="cpu")


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory; one on ``meta`` stays there, a placeholder stays one."""
    if tensor.is_meta:
        return tensor
    if tensor.numel() > 1 and not any(tensor.stride()):
        return placeholder(tensor.shape, tensor.dtype, torch.device("cpu"))
    return tensor.cpu()


def _exchange(root: nn.Module, params: set[nn.Parameter], make: Callable[[nn.Parameter], Tensor]) -> None:
    """Gives each of ``params`` the data that ``make`` makes, on another device, and leaves its identity."""
    recurrent = [m for m in root.modules() if isinstance(m, nn.RNNBase) and params.intersection(m._parameters.values())]
    for module in recurrent:
        module._flat_weight_refs = []  # nobody may hold a weak reference to a tensor that is swapped
    for param in params:
        other = nn.Parameter(make(param), requires_grad=param.requires_grad)
        other.__dict__.update(param.__dict__)
        torch.utils.swap_tensors(param, other)
    for module in recurrent:
        module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in module._flat_weights]


def fill(store: Store, values: dict[int, Tensor]) -> None:
    """Writes the values of parameters that were built; rank 0's, as DDP does.

    Args:
        values: by index; emptied one by one, so that what is written can be freed.
    """
    for index in sorted(values):
        write(store, index, values.pop(index))


def place_buffers(root: nn.Module, device: torch.device) -> None:
    """Moves buffers to the device; they are not sharded."""
    for module in root.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def initialise(root: nn.Module, store: Store, index_of: Mapping[nn.Parameter, int], unbuilt: set[nn.Parameter]) -> None:
    """Initialises what was on ``meta``, so that no rank ever holds more than a few whole parameters.

    A Hugging Face model runs its own ``initialize_weights``, any other module its ``reset_parameters`` (children
    first). A parameter gets memory when an initialiser touches it, and gives it back soon after.

    Raises:
        ConfigurationError: a parameter or a buffer is initialised by nobody.
    """
    device = store.device.device
    if not unbuilt and not any(buffer.is_meta for buffer in root.buffers()):
        return
    buffers = dict(_leave_meta_buffers(root, device))
    with torch.inference_mode(False), torch.no_grad():
        with _MaterialiseOnTouch(store, index_of, unbuilt) as touched:
            adapters = initialise_adapters(root, unbuilt)
            _run_initialisers(root, unbuilt - adapters, set(buffers.values()), touched.seen)
            touched.flush()
        for chunk in store.chunks:
            chunk.rebind()
        missing = [store.layout.params[index_of[p]].name for p in unbuilt if p not in touched.seen]
        indices = {index_of[p] for p in unbuilt}
        for index in sorted({store.layout.place(param)[0] for param in indices}):
            flat, spec = store.read(index), store.layout.chunks[index]
            missing += [
                store.layout.params[slot.param].name
                for slot in spec.slots
                if slot.param in indices and _has_blank(flat[slot.offset : slot.end])
            ]
    missing += [name for name, buffer in buffers.items() if _has_blank(buffer)]
    if missing:
        raise ConfigurationError(
            f"built on the meta device and initialised by nobody: {', '.join(dict.fromkeys(missing))}. Give their "
            "modules a reset_parameters() that fills every parameter and buffer, or build the model without "
            "empty_init."
        )


def _run_initialisers(
    module: nn.Module, unbuilt: set[nn.Parameter], buffers: set[Tensor], seen: set[nn.Parameter]
) -> None:
    whole = getattr(module, "initialize_weights", None)
    if callable(whole) and hasattr(module, "_init_weights"):
        for part in module.modules():
            # set while the model was built on meta, when there was nothing to initialise
            part.__dict__.pop("_is_hf_initialized", None)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor in unbuilt or tensor in buffers:
                tensor.__dict__.pop("_is_hf_initialized", None)
            else:
                tensor.__dict__["_is_hf_initialized"] = True  # it has values
        whole()
        return
    for child in module.children():
        _run_initialisers(child, unbuilt, buffers, seen)
    own = [*module._parameters.values(), *module._buffers.values()]
    if any(tensor is not None and (tensor in unbuilt or tensor in buffers) for tensor in own):
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            # a tied parameter is its first owner's
            tied = [(p, p.data.clone()) for p in module._parameters.values() if p is not None and p in seen]
            reset()
            for param, value in tied:
                param.data.copy_(value)


class _MaterialiseOnTouch(TorchFunctionMode):
    """Gives a parameter memory when a function gets it as an argument, and stores it when others have followed.

    A parameter that has its values already is replaced by one to throw away.
    """

    _ALIVE = 8

    def __init__(self, store: Store, index_of: Mapping[nn.Parameter, int], unbuilt: set[nn.Parameter]) -> None:
        super().__init__()
        self._store = store
        self._index_of = index_of
        self._unbuilt = {id(param) for param in unbuilt}
        self._alive: dict[nn.Parameter, None] = {}
        self.seen: set[nn.Parameter] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        looks_only = name == "__hash__" or (name == "__get__" and func != _GET_DATA)  # at shape, dtype, ...
        if not looks_only:
            args = tuple(self._argument(value) for value in args)
            kwargs = {key: self._argument(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def flush(self) -> None:
        """Stores what is in memory."""
        while self._alive:
            self._store_oldest()

    def _argument(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter) and value in self._index_of:
            if id(value) not in self._unbuilt:
                return nn.Parameter(torch.empty_like(value, memory_format=torch.contiguous_format), value.requires_grad)
            self._touch(value)
        return value

    def _touch(self, param: nn.Parameter) -> None:
        if param in self._alive:
            return
        with torch._C.DisableTorchFunction():
            while len(self._alive) >= self._ALIVE:
                self._store_oldest()
            index = self._index_of[param]
            if param in self.seen:
                param.data = self._reload(index).to(param.dtype)
            else:
                param.data = torch.full(param.shape, _blank(param.dtype), dtype=param.dtype, device=param.device)
        self._alive[param] = None
        self.seen.add(param)

    def _store_oldest(self) -> None:
        with torch._C.DisableTorchFunction():
            param = next(iter(self._alive))
            write(self._store, self._index_of[param], param.data)
            param.data = placeholder(param.shape, param.dtype, param.device)
            del self._alive[param]

    def _reload(self, index: int) -> Tensor:
        chunk, slot = self._store.layout.place(index)
        spec = self._store.layout.params[index]
        return self._store.read(chunk).as_strided(spec.shape, spec.stride, slot.offset).clone()


def _leave_meta_buffers(root: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for path, module in root.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                blank = torch.full(buffer.shape, _blank(buffer.dtype), dtype=buffer.dtype, device=device)
                module._buffers[key] = blank
                yield f"{path}.{key}" if path else key, blank


def _blank(dtype: torch.dtype) -> Any:
    """A value that no initialiser leaves behind."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return False if dtype is torch.bool else torch.iinfo(dtype).max


def _has_blank(tensor: Tensor) -> bool:
    blank = _blank(tensor.dtype)
    if blank is False:
        return False
    return bool((tensor == blank).any() if isinstance(blank, int) else tensor.isnan().any())


def write(store: Store, index: int, value: Tensor) -> None:
    """Stores a whole parameter, rank 0's value; all ranks call."""
    collectives = store.collectives
    if collectives.world_size > 1:
        # contiguous and where the group can reach it
        value = collectives.broadcast(value.detach().to(store.device.device).contiguous())
    store.write(index, value)
