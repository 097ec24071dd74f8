"""Weights and optimizer states in chunks -> flat tensors of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.checkpoint.contents import like
from lightning_gemini.checkpoint.flat import FlatTensor, Run, Source, block_numel
from lightning_gemini.checkpoint.manifest import StoredTensor
from lightning_gemini.checkpoint.reader import CheckpointReader, load
from lightning_gemini.checkpoint.scalars import from_json
from lightning_gemini.core import Engine
from lightning_gemini.core.average import ShardAverage
from lightning_gemini.core.blocks import BLOCK, entries, grain, in_blocks, is_code_book, is_scale, is_stacked
from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.chunk_update import ChunkUpdate
from lightning_gemini.core.errors import ConfigurationError, IncompatibleCheckpointError
from lightning_gemini.core.layout import Slot
from lightning_gemini.core.optimizer_state import numbered, save_groups
from lightning_gemini.core.segments import Segment, State
from lightning_gemini.core.store import Store
from lightning_gemini.core.update import OptimizerOnChunks

OPTIMIZERS = "optimizers"


def state_fqn(optimizer: int, param: str, key: str) -> str:
    """The name of a state in a checkpoint; a dot in ``key`` would look like a part of the parameter's name."""
    return f"{OPTIMIZERS}.{optimizer}.{param}.{key.replace('%', '%25').replace('.', '%2E')}"


def parse_state_fqn(fqn: str) -> tuple[int, str, str] | None:
    """The inverse of :func:`state_fqn`; ``None`` for other names."""
    head, _, rest = fqn.partition(".")
    number, _, rest = rest.partition(".")
    if head != OPTIMIZERS or not number.isdigit():
        return None
    param, _, key = rest.rpartition(".")
    return int(number), param, key.replace("%2E", ".").replace("%25", "%")


def flat_model(engine: Engine, module: nn.Module, frozen: bool = True) -> tuple[dict[str, Any], list[str]]:
    """``module.state_dict()`` with parameters that are spread over the ranks; each rank for itself.

    Args:
        module: the engine's model.
        frozen: whether parameters that require no gradient are in it.

    Returns:
        the state, and the keys of parameters that are left out.

    Raises:
        ConfigurationError: it computes with weights, which are not whole.
        StateError: a step is under way.
    """
    with engine.saving():
        named, weights = module.state_dict(), flat_weights(engine.store)
    places = {
        _whereabouts(param): (place.param, param.requires_grad)
        for chunk in engine.store.chunks
        for param, place in zip(chunk.params, chunk.spec.slots, strict=True)
        if place.numel
    }
    buffers = {buffer.untyped_storage()._cdata for buffer in module.buffers()}
    state: dict[str, Any] = {}
    left_out: list[str] = []
    for key, value in named.items():
        found = None
        if isinstance(value, Tensor) and value.numel():
            # the transpose of a square placeholder looks like the placeholder
            found = None if value._is_view() else places.get(_whereabouts(value))
            if found is None and value.untyped_storage()._cdata not in buffers:
                _require_values(key, value)
        if found is None:
            state[key] = value
        elif found[1] or frozen:
            state[key] = weights[found[0]]
        else:
            left_out.append(key)
    return like(named, state), left_out


def _whereabouts(value: Tensor) -> tuple[Any, ...]:
    """The same of a parameter and of what ``module.state_dict()`` makes of it, and of no other part of its memory."""
    return value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride()


def flat_optimizer(engine: Engine, optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with states that are spread over the ranks; those that this one has a part of."""
    indices = numbered(optimizer, engine.index_of)
    states = flat_states(engine.store, engine.optimizers.of(optimizer))
    state = {number: states[index] for number, index in indices.items() if index in states}
    return {"state": state, "param_groups": save_groups(optimizer)}


def flat_weights(store: Store) -> dict[int, Tensor]:
    """Every parameter by its index, at the precision in which the optimizer has it; waits for updates under way."""
    weights: dict[int, Tensor] = {}
    for chunk in store.chunks:
        master = store.masters.get(chunk.index)
        if master is None:
            source = Source(chunk.shard)
        elif master.part.dtype == torch.float32:
            _ = chunk.shard  # an update may write to the master
            source = Source(master.part)
        else:
            source = Source(chunk.shard, master.part)
        for slot, place in enumerate(chunk.spec.slots):
            weights[place.param] = flat_like(store, chunk, slot, source)
    return weights


def _require_values(key: str, value: Tensor) -> None:
    if value.is_floating_point() and bool(value.isnan().all()):
        raise ConfigurationError(
            f"state_dict()[{key!r}] is made of weights that are spread over the ranks, so it has no values (NaN). Let "
            "state_dict() return parameters themselves, or use GeminiStrategy(state_dict_type='full')."
        )


def flat_like(store: Store, chunk: Chunk, slot: int, source: Source) -> Tensor:
    """A tensor that looks like the ``slot``-th parameter of ``chunk``, and lies in ``source`` as that in its shard."""
    shape, stride, place = chunk.shapes[slot], chunk.strides[slot], chunk.spec.slots[slot]
    if not place.numel:
        return torch.empty(shape, dtype=source.dtype)  # no block could say that it exists
    mine, here = store.own_range(chunk.index, place), store.owned(chunk.index, place.offset, place.end)
    runs = [Run(mine.start, len(mine), source, here.start)] if len(mine) else []
    return FlatTensor(shape, stride, source.dtype, runs)


def flat_average(store: Store, average: ShardAverage) -> dict[str, Tensor]:
    """An average of weights by parameter name."""
    return {
        name: flat_like(store, chunk, slot, source)
        for chunk, source in ((chunk, Source(values)) for chunk, values in average.parts())
        for slot, name in enumerate(chunk.names)
    }


def flat_states(store: Store, chunks: OptimizerOnChunks) -> dict[int, State]:
    """The state of each parameter of which this rank owns a part, by index: flat tensors, small ones, and numbers."""
    states: dict[int, State] = {}
    for update in chunks.updates:
        if update.is_new:
            continue
        for segment in update.shard.segments:
            for key, value in segment.state.items():
                for slot, state in _slot_states(store, update, segment, key, value):
                    states.setdefault(update.chunk.spec.slots[slot].param, {})[key] = state
    return states


def _slot_states(
    store: Store, update: ChunkUpdate, segment: Segment, key: str, value: Any
) -> Iterator[tuple[int, Any]]:
    size = grain(key, value, segment.numel)
    if not size:
        for slot in segment.slots:
            yield slot, value.detach().cpu() if isinstance(value, Tensor) else value
        return
    chunk = update.chunk
    rows = [Source(row) for row in value.view(-1, value.shape[-1])]
    for slot in segment.slots:
        place = chunk.spec.slots[slot]
        here = store.owned(chunk.index, place.offset, place.end)
        at = entries(here.start - segment.start, here.stop - segment.start, size).start
        stacked = tuple(value.shape[:-1])
        yield slot, _flat_state(store, chunk, slot, key, stacked, value.dtype, [(row, at) for row in rows])


def _flat_state(
    store: Store,
    chunk: Chunk,
    slot: int,
    key: str,
    stacked: tuple[int, ...],
    dtype: torch.dtype,
    rows: Sequence[tuple[Source, int]],
) -> FlatTensor:
    """A parameter's state, of which ``rows`` hold this rank's part: one for each index of the stacked dimensions."""
    place = chunk.spec.slots[slot]
    mine = store.own_range(chunk.index, place)
    shape, stride, part = chunk.shapes[slot], chunk.strides[slot], entries(mine.start, mine.stop, 1)
    if is_scale(key):
        shape, stride, part = (-(-place.numel // BLOCK),), (1,), entries(mine.start, mine.stop, BLOCK)
    numel = prod(shape)
    outer = tuple(prod(stacked[dim + 1 :]) * numel for dim in range(len(stacked)))
    runs = [
        Run(number * numel + part.start, part.stop - part.start, source, at)
        for number, (source, at) in enumerate(rows)
        if part.stop > part.start
    ]
    return FlatTensor((*stacked, *shape), (*outer, *stride), dtype, runs)


def load_weights(store: Store, wanted: Mapping[int, str], reader: CheckpointReader) -> list[Chunk]:
    """Reads this rank's part of parameters, one chunk at a time.

    Args:
        wanted: names in the checkpoint by parameter index, the same on all ranks.

    Returns:
        the chunks that have changed; those that live in their unsharded storage have their own slice only.
    """
    slots = {
        chunk: {slot: place for slot, place in enumerate(chunk.spec.slots) if place.param in wanted and place.numel}
        for chunk in store.chunks
    }
    changed = [chunk for chunk in store.chunks if slots[chunk]]
    memory = torch.empty(max((_weight_bytes(store, chunk) for chunk in changed), default=0), dtype=torch.uint8)
    for chunk in changed:
        values = memory[: _weight_bytes(store, chunk)].view(_weight_dtype(store, chunk))
        source = Source(values)
        for places in _by_name(slots[chunk], wanted):
            tensors = {name: flat_like(store, chunk, slot, source) for name, slot in places.items()}
            load(reader, tensors, cast=True, direct=True)
        for place in slots[chunk].values():
            _store(store, chunk, store.owned(chunk.index, place.offset, place.end), values)
    return changed


def _by_name(slots: Mapping[int, Slot], wanted: Mapping[int, str]) -> list[dict[str, int]]:
    """The slots by name; where several want what was one tensor when it was saved, one after the other."""
    found: list[dict[str, int]] = []
    for slot, place in slots.items():
        name = wanted[place.param]
        free = next((places for places in found if name not in places), None)
        if free is None:
            found.append({name: slot})
        else:
            free[name] = slot
    return found


def _store(store: Store, chunk: Chunk, mine: range, values: Tensor) -> None:
    """Stores the weights ``mine`` of a shard, ``values[mine]``, in blocks: what masters make on the way stays small."""
    block = block_numel(chunk.shard.device)
    for start in range(mine.start, mine.stop, block):
        store.put(chunk, start, values[start : min(start + block, mine.stop)])


def _weight_dtype(store: Store, chunk: Chunk) -> torch.dtype:
    return torch.float32 if chunk.index in store.masters else chunk.shard.dtype


def _weight_bytes(store: Store, chunk: Chunk) -> int:
    return chunk.shard.numel() * _weight_dtype(store, chunk).itemsize


def refresh(store: Store, changed: Sequence[Chunk]) -> None:
    """Brings the other ranks' slices into chunks that are never freed; all ranks call."""
    for chunk in changed:
        if chunk.home is Home.FULL:
            store.refresh(chunk).wait()


def load_states(store: Store, chunks: OptimizerOnChunks, number: int, reader: CheckpointReader) -> None:
    """Reads this rank's part of the states of optimizer ``number``, one chunk at a time."""
    keys: dict[str, list[str]] = {}
    for fqn in reader.manifest.tensors:
        parsed = parse_state_fqn(fqn)
        if parsed is not None and parsed[0] == number:
            keys.setdefault(parsed[1], []).append(parsed[2])
    scalars = reader.manifest.about[OPTIMIZERS][number]["scalars"]
    for update in chunks.updates:
        names = update.chunk.names
        if update.is_new and not any(name in keys or name in scalars for name in names):
            continue
        update.shard.load(_read_slots(store, update, number, keys, scalars, reader), adopt=True)
        update.count_state()


def _read_slots(
    store: Store,
    update: ChunkUpdate,
    number: int,
    keys: Mapping[str, Sequence[str]],
    scalars: Mapping[str, Mapping[str, Any]],
    reader: CheckpointReader,
) -> dict[int, State]:
    states: dict[int, State] = {}
    forms: dict[str, dict[int, _Form]] = {}
    dtype = update.state_dtype
    for slot, name in enumerate(update.chunk.names):
        if not len(store.own_range(update.chunk.index, update.chunk.spec.slots[slot])):
            continue
        state = states[slot] = {key: from_json(value) for key, value in scalars.get(name, {}).items()}
        for key in keys.get(name, ()):
            fqn = state_fqn(number, name, key)
            form = _form(update, slot, key, reader.manifest.tensors[fqn], dtype)
            if form is None:
                state[key] = reader.tensor(fqn)
            else:
                forms.setdefault(key, {})[slot] = form
    wanted: dict[str, Tensor] = {}
    for key, of_slots in forms.items():
        runs = [(form, list(run)) for form, run in groupby(states, key=of_slots.get) if form is not None]
        for form, slots in runs:
            for slot, memory in _memory(store, update.chunk, slots, form):
                states[slot][key] = memory
                rows = [(Source(row), 0) for row in memory.view(-1, memory.shape[-1])]
                fqn = state_fqn(number, update.chunk.names[slot], key)
                wanted[fqn] = _flat_state(store, update.chunk, slot, key, form.stacked, form.dtype, rows)
    load(reader, wanted, cast=True, direct=True)
    return states


class _Form(NamedTuple):
    """What a state that is spread over the ranks looks like here."""

    dtype: torch.dtype
    stacked: tuple[int, ...]  #: the dimensions before the parameter's own
    grain: int  #: elements of the parameter that an entry is for
    joined: bool  #: whether those of several parameters can lie in one tensor


def _form(update: ChunkUpdate, slot: int, key: str, saved: StoredTensor, dtype: torch.dtype) -> _Form | None:
    """``None`` for what is not spread; ``dtype`` is that of floating-point states."""
    place = update.chunk.spec.slots[slot]
    shape, like = tuple(saved.shape), torch.empty(saved.shape, dtype=saved.dtype, device="meta")
    expected = (-(-place.numel // BLOCK),) if is_scale(key) else update.chunk.shapes[slot]
    stacked = shape[: len(shape) - len(expected)]
    if shape[len(stacked) :] != expected or (stacked and not is_scale(key) and not is_stacked(key, like, expected)):
        if is_scale(key) or (not is_code_book(key) and prod(shape) == place.numel):
            raise IncompatibleCheckpointError(
                f"the state {key!r} of {update.chunk.names[slot]} should have the shape {expected}, but has {shape}."
            )
        return None
    blocks = in_blocks(update.optimizer)
    dtype = saved.dtype if blocks or not saved.dtype.is_floating_point else dtype
    return _Form(dtype, stacked, BLOCK if is_scale(key) else 1, joined=not (blocks or stacked))


def _memory(store: Store, chunk: Chunk, slots: Sequence[int], form: _Form) -> Iterator[tuple[int, Tensor]]:
    """Memory for this rank's part of a state of consecutive slots; joined, it is as the shard is going to have it."""
    places = [chunk.spec.slots[slot] for slot in slots]
    if not form.joined:
        for slot, place in zip(slots, places, strict=True):
            mine = store.own_range(chunk.index, place)
            part = entries(mine.start, mine.stop, form.grain)
            yield slot, torch.empty((*form.stacked, part.stop - part.start), dtype=form.dtype)
        return
    spans = [store.owned(chunk.index, place.offset, place.end) for place in places]
    first = end = spans[0].start
    whole = torch.empty(spans[-1].stop - first, dtype=form.dtype)
    for slot, span in zip(slots, spans, strict=True):
        whole[end - first : span.start - first] = 0
        end = span.stop
        yield slot, whole[span.start - first : end - first]
