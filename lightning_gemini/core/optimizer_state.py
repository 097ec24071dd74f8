"""An optimizer's state by parameter, as torch writes it, out of the chunks and into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gemini.core.chunk_update import ChunkUpdate
from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.segments import State, is_elementwise
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
    return [optimizer.register_state_dict_post_hook(save), optimizer.register_load_state_dict_pre_hook(load)]


def gather_state_dict(chunks: OptimizerOnChunks, store: Store, index_of: Mapping[nn.Parameter, int]) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` would be without chunks: parameters numbered in the order of the groups.

    All ranks take part; whole tensors, in host memory, come to rank 0 alone, the others get an empty state.
    """
    states: dict[int, State] = {}
    for update in chunks.updates:
        states.update(_gather_chunk(update, store))
    state, groups, number = {}, [], 0
    for group in chunks.optimizer.param_groups:
        numbers = []
        for param in group["params"]:
            if states.get(index_of[param]):
                state[number] = states[index_of[param]]
            numbers.append(number)
            number += 1
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
    return {"state": state, "param_groups": groups}


def load_state_dict(
    chunks: OptimizerOnChunks, store: Store, index_of: Mapping[nn.Parameter, int], saved: Mapping[str, Any]
) -> None:
    """Does what ``optimizer.load_state_dict(saved)`` does; every rank has the whole of ``saved``.

    Raises:
        ConfigurationError: the groups differ, or a state has another shape than its parameter; nothing is changed.
    """
    groups = chunks.optimizer.param_groups
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    ours = [len(group["params"]) for group in groups]
    if theirs != ours:
        raise ConfigurationError(
            f"the checkpoint's optimizer has {theirs} parameters in its groups, this {type(chunks.optimizer).__name__} "
            f"has {ours}. Build the same optimizer over the same parameters, or load the weights only."
        )
    states: dict[int, State] = {}
    for group, saved_group in zip(groups, saved["param_groups"], strict=True):
        for param, number in zip(group["params"], saved_group["params"], strict=True):
            if number in saved["state"]:
                states[index_of[param]] = dict(saved["state"][number])
    load_states(chunks, store, states)
    for group, saved_group in zip(groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})


def load_states(chunks: OptimizerOnChunks, store: Store, states: Mapping[int, State]) -> None:
    """Puts whole parameters' states, by parameter index, where the chunks keep theirs."""
    layout = store.layout
    elementwise = {
        key
        for index, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() and tuple(value.shape) == layout.params[index].shape
    }
    if not elementwise:  # nothing but 0-d parameters: their states look like counters
        elementwise = {key for state in states.values() for key, value in state.items() if isinstance(value, Tensor)}
        elementwise.discard("step")
    for index, state in states.items():
        for key in elementwise & state.keys():
            if tuple(state[key].shape) != layout.params[index].shape:
                raise ConfigurationError(
                    f"the state {key!r} of {layout.params[index].name} should have the parameter's shape "
                    f"{layout.params[index].shape}, but has {tuple(state[key].shape)}."
                )
    for update in chunks.updates:
        if update.is_new and not any(place.param in states for place in update.chunk.spec.slots):
            continue
        slots = {}
        for slot, place in enumerate(update.chunk.spec.slots):
            state = states.get(place.param, {})
            slots[slot] = {
                key: _cut(update, store, slot, value) if key in elementwise else value for key, value in state.items()
            }
        update.shard.load(slots)
        update.count_state()


def _cut(update: ChunkUpdate, store: Store, slot: int, value: Tensor) -> Tensor:
    """The part of a whole parameter's state that belongs to this rank's span."""
    dtype = update.state_dtype if value.is_floating_point() else value.dtype
    flat = flatten_like(value, update.chunk.strides[slot], dtype)
    return store.own_part(update.chunk.index, update.chunk.spec.slots[slot], flat).to(update.chunk.shard.device)


def _gather_chunk(update: ChunkUpdate, store: Store) -> dict[int, State]:
    if update.is_new:  # on all ranks, then
        return {}
    numel, device = update.chunk.shard.numel(), update.chunk.shard.device
    local: dict[int, dict[str, Any]] = {}
    shards: dict[str, Tensor] = {}
    for slot, span, state in update.shard.slot_states():
        for key, value in state.items():
            if is_elementwise(value, len(span)):
                if key not in shards:
                    shards[key] = torch.zeros(numel, dtype=value.dtype, device=device)
                shards[key][span.start : span.stop] = value
                local.setdefault(slot, {})[key] = value.dtype
            else:
                local.setdefault(slot, {})[key] = value.cpu() if isinstance(value, Tensor) else value
    every = store.collectives.gather_objects(local)
    merged: dict[int, dict[str, Any]] = {}
    for part in every:
        for slot, entries in part.items():
            merged.setdefault(slot, {}).update(entries)
    dtypes = {k: v for entries in merged.values() for k, v in entries.items() if isinstance(v, torch.dtype)}
    chunk, result = update.chunk, {slot: dict(entries) for slot, entries in merged.items()}
    for key, dtype in sorted(dtypes.items()):
        shard = shards.get(key)
        if shard is None:
            shard = torch.zeros(numel, dtype=dtype, device=device)
        flat = store.assemble(chunk.index, shard)
        for slot in merged if store.collectives.rank == 0 else ():
            if key in merged[slot]:
                result[slot][key] = chunk.view_in(flat, slot).clone().cpu()
    if store.collectives.rank:
        return {}
    return {chunk.spec.slots[slot].param: entries for slot, entries in sorted(result.items())}
