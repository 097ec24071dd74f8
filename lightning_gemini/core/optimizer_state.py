"""An optimizer's state by parameter, as torch writes it, out of the chunks and into them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gemini.core.blocks import (
    BLOCK,
    entries,
    grain,
    in_blocks,
    is_code_book,
    is_scale,
    is_stacked,
    unwrapped,
    wrapped,
)
from lightning_gemini.core.chunk_update import ChunkUpdate
from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.layout import ParamSpec
from lightning_gemini.core.segments import State
from lightning_gemini.core.store import Store, flatten_like
from lightning_gemini.core.update import OptimizerOnChunks


def attach(chunks: OptimizerOnChunks, store: Store, index_of: Mapping[nn.Parameter, int]) -> list[RemovableHandle]:
    """Makes ``optimizer.state_dict()`` and ``load_state_dict()`` mean the state in the chunks; all ranks have to call.

    Returns:
        what undoes it.
    """

    def save(_: Optimizer, __: dict[str, Any]) -> dict[str, Any]:
        return gather_state_dict(chunks, store, index_of)

    def load(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        load_state_dict(chunks, store, index_of, saved)
        return {**saved, "state": {}}  # torch takes the groups

    optimizer = chunks.optimizer
    handles = [optimizer.register_state_dict_post_hook(save), optimizer.register_load_state_dict_pre_hook(load)]
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:

        def load_as_torch(saved: dict[str, Any], *_: Any, **__: Any) -> None:
            """Overrides call no hooks (bitsandbytes), or want the states where torch puts them (pytorch_optimizer)."""
            Optimizer.load_state_dict(optimizer, saved)

        handles.append(_Override(optimizer, "load_state_dict", load_as_torch))
    for name in ("train", "eval"):
        if callable(getattr(optimizer, name, None)):
            handles.append(_Override(optimizer, name, partial(_refuse_mode, optimizer, name)))
    return handles


def _refuse_mode(optimizer: Optimizer, name: str) -> None:
    """Schedule-free optimizers exchange the weights between steps, and would do nothing to those in chunks."""
    raise ConfigurationError(
        f"{type(optimizer).__name__}.{name}() would exchange weights outside of a step, but they are in chunks; "
        "training and evaluation go on with the training ones. For the averaged ones load a checkpoint into a plain "
        f"model and optimizer, and call {name}() there."
    )


class _Override(RemovableHandle):
    """A method of one object, replaced until this is removed."""

    def __init__(self, owner: object, name: str, method: Callable[..., Any]) -> None:
        super().__init__(OrderedDict())
        self._methods, self._name = owner.__dict__, name
        self._methods[name] = method

    def remove(self) -> None:
        self._methods.pop(self._name, None)


def gather_state_dict(chunks: OptimizerOnChunks, store: Store, index_of: Mapping[nn.Parameter, int]) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` would be without chunks: parameters numbered in the order of the groups.

    All ranks take part; whole tensors, in host memory, come to rank 0 alone, the others get an empty state.
    """
    states: dict[int, State] = {}
    for update in chunks.updates:
        states.update(_gather_chunk(update, store))
    found = {number: states.get(index, {}) for number, index in numbered(chunks.optimizer, index_of).items()}
    state = {number: wrapped(chunks.optimizer, one) for number, one in found.items() if one}
    return {"state": state, "param_groups": save_groups(chunks.optimizer)}


def numbered(optimizer: Optimizer, index_of: Mapping[nn.Parameter, int]) -> dict[int, int]:
    """The index of each parameter by its number in a state dict: torch counts them in the order of the groups."""
    return dict(enumerate(index_of[param] for group in optimizer.param_groups for param in group["params"]))


def save_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups' settings, with numbers in the place of parameters, as torch writes them."""
    groups, number = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({**settings, "params": list(range(number, number + count))})
        number += count
    return groups


def load_groups(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Takes the settings of :func:`save_groups`, of as many groups."""
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})


def require_groups(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigurationError if groups that were saved have other numbers of parameters than the optimizer's."""
    theirs = [len(group["params"]) for group in saved]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        raise ConfigurationError(
            f"the checkpoint's optimizer has {theirs} parameters in its groups, this {type(optimizer).__name__} "
            f"has {ours}. Build the same optimizer over the same parameters, or load the weights only."
        )


def load_state_dict(
    chunks: OptimizerOnChunks, store: Store, index_of: Mapping[nn.Parameter, int], saved: Mapping[str, Any]
) -> None:
    """Does what ``optimizer.load_state_dict(saved)`` does; every rank has the whole of ``saved``.

    Raises:
        ConfigurationError: the groups differ, or a state has another shape than its parameter; nothing is changed.
    """
    require_groups(chunks.optimizer, saved["param_groups"])
    groups = chunks.optimizer.param_groups
    states: dict[int, State] = {}
    for group, saved_group in zip(groups, saved["param_groups"], strict=True):
        for param, number in zip(group["params"], saved_group["params"], strict=True):
            if number in saved["state"]:
                states[index_of[param]] = unwrapped(chunks.optimizer, saved["state"][number])
    load_states(chunks, store, states)
    load_groups(chunks.optimizer, saved["param_groups"])


def load_states(chunks: OptimizerOnChunks, store: Store, states: Mapping[int, State]) -> None:
    """Puts whole parameters' states, by parameter index, where the chunks keep theirs."""
    layout = store.layout
    shared = {key for state in states.values() for key in state if is_scale(key) or is_code_book(key)}
    elementwise = {
        key
        for index, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() and _has_shape(key, value, layout.params[index].shape)
    } - shared
    if not elementwise:  # nothing but 0-d parameters: their states look like counters
        elementwise = {key for state in states.values() for key, value in state.items() if isinstance(value, Tensor)}
        elementwise -= {"step", *shared}
    for index, state in states.items():
        _check(state, elementwise, layout.params[index])
    for update in chunks.updates:
        if update.is_new and not any(place.param in states for place in update.chunk.spec.slots):
            continue
        slots = {}
        for slot, place in enumerate(update.chunk.spec.slots):
            state = states.get(place.param, {})
            slots[slot] = {
                key: _cut(update, store, slot, key, value) if key in elementwise or is_scale(key) else value
                for key, value in state.items()
            }
        update.shard.load(slots)
        update.count_state()


def _check(state: State, elementwise: Collection[str], param: ParamSpec) -> None:
    for key in state:
        if is_scale(key) and state[key].shape[-1] != -(-param.numel // BLOCK):
            raise ConfigurationError(
                f"the state {key!r} of {param.name} should have an entry for each {BLOCK} of its {param.numel} "
                f"elements, but has {state[key].shape[-1]}."
            )
        if key in elementwise and not _has_shape(key, state[key], param.shape):
            raise ConfigurationError(
                f"the state {key!r} of {param.name} should have the parameter's shape {param.shape}, but has "
                f"{tuple(state[key].shape)}."
            )


def _has_shape(key: str, value: Tensor, shape: tuple[int, ...]) -> bool:
    return tuple(value.shape[is_stacked(key, value, shape) :]) == shape


def _cut(update: ChunkUpdate, store: Store, slot: int, key: str, value: Tensor) -> Tensor:
    """The part of a whole parameter's state that belongs to this rank's span."""
    chunk, place = update.chunk, update.chunk.spec.slots[slot]
    if is_scale(key):
        mine = store.own_range(chunk.index, place)
        return value[..., entries(mine.start, mine.stop, BLOCK)].to(chunk.shard.device)
    keeps = in_blocks(update.optimizer) or not value.is_floating_point()
    dtype, stride = value.dtype if keeps else update.state_dtype, chunk.strides[slot]
    if is_stacked(key, value, store.layout.params[place.param].shape):
        return torch.stack([_cut(update, store, slot, "", row) for row in value])
    return store.own_part(chunk.index, place, flatten_like(value, stride, dtype)).to(chunk.shard.device)


class _Form(NamedTuple):
    """How a state that is spread over the ranks looks on each of them."""

    key: str
    dtype: torch.dtype
    stacked: tuple[int, ...]  #: the dimensions before the last
    grain: int

    def zeros(self, numel: int, device: torch.device) -> Tensor:
        return torch.zeros((*self.stacked, numel // self.grain), dtype=self.dtype, device=device)


def _gather_chunk(update: ChunkUpdate, store: Store) -> dict[int, State]:
    if update.is_new:  # on all ranks, then
        return {}
    numel, device = update.chunk.shard.numel(), update.chunk.shard.device
    local: dict[int, dict[str, Any]] = {}
    shards: dict[_Form, Tensor] = {}
    for slot, span, state in update.shard.slot_states():
        mine = local.setdefault(slot, {})
        for key, value in state.items():
            if size := grain(key, value, len(span)):
                mine[key] = form = _Form(key, value.dtype, tuple(value.shape[:-1]), size)
                if form not in shards:
                    shards[form] = form.zeros(numel, device)
                shards[form][..., entries(span.start, span.stop, size)] = value
            else:
                mine[key] = value.cpu() if isinstance(value, Tensor) else value
    merged: dict[int, dict[str, Any]] = {}
    for part in store.collectives.gather_objects(local):
        for slot, state in part.items():
            merged.setdefault(slot, {}).update(state)
    forms = {form for state in merged.values() for form in state.values() if isinstance(form, _Form)}
    result = {slot: dict(state) for slot, state in merged.items()}
    for form in sorted(forms, key=str):
        shard = shards[form] if form in shards else form.zeros(numel, device)
        rows = [store.assemble(update.chunk.index, row) for row in shard.view(-1, shard.shape[-1])]
        for slot in merged if store.collectives.rank == 0 else ():
            if merged[slot].get(form.key) == form:
                result[slot][form.key] = _whole(update, slot, form, rows)
    if store.collectives.rank:
        return {}
    return {update.chunk.spec.slots[slot].param: state for slot, state in sorted(result.items())}


def _whole(update: ChunkUpdate, slot: int, form: _Form, rows: list[Tensor]) -> Tensor:
    """One parameter's state, in host memory."""
    place = update.chunk.spec.slots[slot]
    mine = entries(place.offset, place.end, form.grain)
    parts = [update.chunk.view_in(row, slot) if form.grain == 1 else row[mine] for row in rows]
    return (torch.stack(parts) if form.stacked else parts[0].clone()).cpu()
