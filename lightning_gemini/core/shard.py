"""``shard(model)``: checks what it is given, plans the layout and moves the model into chunks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_gemini.core import construct
from lightning_gemini.core.blocks import BLOCK, in_blocks, require_contiguous
from lightning_gemini.core.chunk import Home
from lightning_gemini.core.collectives import Collectives
from lightning_gemini.core.cores import claim, share
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.elementwise import require_elementwise
from lightning_gemini.core.engine import Engine
from lightning_gemini.core.errors import ConfigurationError, DisagreementError
from lightning_gemini.core.first_homes import PlacementName, first_homes, fits_whole
from lightning_gemini.core.footprint import Footprints
from lightning_gemini.core.layout import ALIGNMENT, Layout, ParamSpec, plan_layout
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.placement import PlacementPolicy
from lightning_gemini.core.report import chunk_states, gradient_states
from lightning_gemini.core.sources import load_sources
from lightning_gemini.core.speeds import Speeds
from lightning_gemini.core.state_width import StateWidths
from lightning_gemini.core.store import Store
from lightning_gemini.core.units import Unit, find_units
from lightning_gemini.core.update_policy import UpdatePolicy
from lightning_gemini.optim.kernel import UnavailableError, kernel_for
from lightning_gemini.optim.recognise import recognise

#: Where chunks have to move they are small enough for so many to be in use, idle, or with gradients on the device; and,
#: where they may live there with their optimizer states, for so many homes, so that what is left over is little.
_CHUNKS_AT_ONCE, _HOMES_AT_LEAST = 10, 8


def shard(
    model: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    *,
    group: dist.ProcessGroup | None = None,
    reduce_group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    placement: PlacementName = "auto",
    device_memory: int | None = None,
    host_memory: int | None = None,
    chunk_size: int | Literal["auto"] = "auto",
    prefetch: int | None = None,
    speeds: Speeds | None = None,
    unit_modules: Collection[str | type] = (),
    policy: DtypePolicy = DtypePolicy(),  # noqa: B008, it is frozen
    update: UpdatePolicy = UpdatePolicy(),  # noqa: B008, likewise
    unbuilt: Collection[nn.Parameter] = (),
    sources: Sequence[construct.WeightSource] = (),
    home: Home | None = None,
    check: bool = False,
    hang_folder: str | Path = ".",
) -> Engine:
    """Moves ``model`` into chunks that are shared by the ranks of ``group``.

    The model keeps its modules and its ``nn.Parameter`` objects. From then on ``model(x)``, ``loss.backward()``,
    ``optimizer.step()`` and ``optimizer.zero_grad()`` work as before.

    Args:
        model: built, or on the ``meta`` device, and then loaded (see :func:`sources.attach`) or initialised here (see
            :func:`construct.initialise`).
        optimizers: over parameters of the model. A trainable parameter of none of them gets no gradient.
        group: the ranks; ``None`` for one process alone.
        reduce_group: the same ranks in a second group, for reductions (see ``collectives``).
        device: where units compute.
        placement: ``"device"`` keeps everything there, ``"host"`` keeps shards and optimizer states in host memory,
            ``"auto"`` does the first if it fits; else it records one step and plans what is where.
        device_memory: bytes that chunks may use on the device, ``None`` for no bound. On the CPU it is emulated.
        host_memory: bytes that chunks may use in host memory, ``None`` for no bound.
        chunk_size: elements in a chunk, or ``"auto"``.
        prefetch: the most chunks that are brought ahead of their need; ``None`` for as many as there is room for.
        speeds: of copies and updates, the same on all ranks; ``None`` to measure them. With speeds given, plans on an
            emulated device are made for the least time, too, and not for the fewest bytes.
        unit_modules: modules that are made usable as a whole (see :func:`units.find_units`).
        policy: the dtypes.
        update: when updates are made, and what becomes of gradients that are not finite.
        unbuilt: parameters that :func:`construct.leave_meta` was called for already.
        sources: of values to take instead of some parameters' own.
        home: where every chunk's shard lives, instead of what ``placement`` makes of it.
        check: watch every step, not only the first of each kind, for reads that hooks cannot see (see ``hidden``).
        hang_folder: where a rank that waits for others in vain leaves ``gemini_hang-rank0.txt`` with its own number;
            by default the working directory. Not made before there is something to write.

    Raises:
        ConfigurationError: what is given cannot work; the model is as it was.
        OutOfBudgetError: it does not fit; the model is as it was.
        DisagreementError: the ranks have different models or settings.
        PeerError: another rank could not load the model's values.
    """
    device = torch.device(device)
    collectives = Collectives(group, reduce_group, Path(hang_folder))
    params = list(dict.fromkeys(model.parameters()))
    index_of = {param: index for index, param in enumerate(params)}
    given = {param for source in sources for param in source.params}
    specs = specify(model, optimizers, policy, {*unbuilt, *given})
    units = find_units(model, index_of, unit_modules)
    tried = {
        number: _require_rules(optimizer, f"optimizer {number}", device, policy)
        for number, optimizer in enumerate(optimizers)
    }
    limits = collectives.gather_objects((device_memory, host_memory))
    tiers = (
        Tier("device", device, min((d for d, _ in limits if d is not None), default=None)),
        Tier("host", torch.device("cpu"), min((h for _, h in limits if h is not None), default=None)),
    )
    dtypes = [param.dtype for param in params]
    widths = StateWidths(optimizers, tried)
    takes = partial(Footprints, policy=policy, update=update, widths=widths, dtypes=dtypes)
    alignment = BLOCK if any(in_blocks(optimizer) for optimizer in optimizers) else ALIGNMENT
    sizes = (collectives.world_size, chunk_size, alignment)
    footprints, homes = _plan(specs, units, *sizes, tiers, placement, home, takes)
    layout = footprints.layout
    masters = {spec.index for spec in layout.chunks if footprints.has_master(spec)}
    _prepare_kernels(optimizers, {tier.device for tier in tiers if placement == "auto" or tier.name in _tiers(homes)})
    _require_agreement(layout, collectives)
    missing = {*unbuilt, *construct.leave_meta(model, device)} - given
    values = {index: param.data for param, index in index_of.items() if param not in missing | given}
    try:
        threads = share(collectives.rank, collectives.gather_objects(claim(device))) if update.overlap else None
        store = Store(layout, params, homes, masters, policy, collectives, *tiers, threads)
    except BaseException:
        for index, value in values.items():
            params[index].data = value
        raise
    for param in params:
        param.grad = None  # of a backward before; the chunks start with none
    construct.fill(store, values)
    for source in sources:
        source.fill(store, index_of)
    missing -= load_sources(model, store, index_of, missing)
    construct.initialise(model, store, index_of, missing)
    construct.place_buffers(model, device)
    moves = PlacementPolicy(
        homes="auto" if placement == "auto" and home is None else "fixed",
        narrow=placement == "host" or home is not None,
        depth=prefetch,
        speeds=speeds,
    )
    engine = Engine(model, params, dtypes, store, optimizers, units, footprints, moves, check)
    collectives.pulse.sections |= {
        "Chunks": partial(chunk_states, store),
        "Gradients": partial(gradient_states, engine.optimizers.gradients(None)),
        "Memory": engine.memory_report,
    }
    collectives.watch()
    return engine


def _require_rules(optimizer: Optimizer, name: str, device: torch.device, policy: DtypePolicy) -> list[float]:
    """Raises ConfigurationError if ``optimizer`` cannot work on chunks under ``policy``.

    Returns:
        by group, the elements of state for each element of a parameter.
    """
    rules = [recognise(optimizer, group) for group in optimizer.param_groups]
    if all(rule is not None for rule in rules):
        return [float(len(rule.state_names)) for rule in rules if rule is not None]
    if in_blocks(optimizer):
        require_contiguous(optimizer, name)
    states = require_elementwise(optimizer, name, device)
    if policy.state != torch.float32:
        raise ConfigurationError(
            f"{name} ({type(optimizer).__name__}) makes its own states, so they cannot be kept in {policy.state}. Use "
            "torch.optim.AdamW, Adam, SGD or Adagrad or lightning_gemini.optim.Lion with plain settings, or fp32 "
            "states."
        )
    return states


def _prepare_kernels(optimizers: Sequence[Optimizer], devices: Collection[torch.device]) -> None:
    """Makes what the updates of shards on ``devices`` need now rather than in the first step."""
    try:
        for device in devices if optimizers else ():
            kernel = kernel_for(device)  # gradients need it without a rule, too
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    if (rule := recognise(optimizer, group)) is not None:
                        kernel.prepare(rule)
    except (ValueError, UnavailableError) as error:
        raise ConfigurationError(str(error)) from error


def specify(
    model: nn.Module, optimizers: Sequence[Optimizer], policy: DtypePolicy, unbuilt: Collection[nn.Parameter] = ()
) -> list[ParamSpec]:
    """What the layout has to know of the model's parameters, each once, in definition order.

    Raises:
        ConfigurationError: the parameters and the optimizers do not go together.
    """
    names = {param: name for name, param in model.named_parameters()}
    if not names:
        raise ConfigurationError(f"{type(model).__name__} has no parameters: there is nothing to shard.")
    empty = [name for param, name in names.items() if param not in unbuilt and not _has_values(param)]
    if empty:
        raise ConfigurationError(
            f"{', '.join(empty[:3])}{' and others' if len(empty) > 3 else ''}: the parameter holds no values, because "
            "an earlier run ended in an exception while they were spread over the ranks. Load a checkpoint into the "
            "model, or build it anew."
        )
    _refuse_overlaps(names, unbuilt)
    if optimizers and not any(param.requires_grad for param in names):
        raise ConfigurationError(
            f"no parameter of {type(model).__name__} is trainable (requires_grad is False for all {len(names)}). "
            "Unfreeze what should be trained before configure_optimizers is called."
        )
    owner: dict[nn.Parameter, tuple[int, int]] = {}
    for number, optimizer in enumerate(optimizers):
        for group, settings in enumerate(optimizer.param_groups):
            for param in settings["params"]:
                if param not in names:
                    raise ConfigurationError(
                        f"optimizer {number} ({type(optimizer).__name__}), parameter group {group}, has a tensor of "
                        f"shape {tuple(param.shape)} that is no parameter of the model. Build the optimizer from "
                        "self.parameters(), in configure_optimizers, and register every tensor that it should train."
                    )
                if param in owner:
                    raise ConfigurationError(
                        f"{names[param]} is in optimizer {owner[param][0]} and in optimizer {number}; a parameter can "
                        "be updated by one of them only."
                    )
                owner[param] = (number, group)
    whole = _keep_dtype(model) if policy.master else set()
    return [
        ParamSpec(
            name,
            tuple(param.shape),
            # a view of a larger tensor, say, is laid out anew; channels-last is kept
            tuple(torch.empty_like(param, device="meta").stride()),
            param.dtype if param in whole else policy.compute_dtype(param.dtype),
            param.requires_grad,
            *owner.get(param, (None, None)),
        )
        for param, name in names.items()
    ]


def _plan(
    specs: Sequence[ParamSpec],
    units: Sequence[Unit],
    world_size: int,
    chunk_size: int | Literal["auto"],
    alignment: int,
    tiers: tuple[Tier, Tier],
    placement: PlacementName,
    home: Home | None,
    takes: Callable[[Layout], Footprints],
) -> tuple[Footprints, list[Home]]:
    """The layout with what ``takes`` says of it, and where its chunks live at first; smaller ones where they move."""
    device, host = tiers
    footprints = takes(plan_layout(specs, world_size, chunk_size, alignment))
    if home is None and fits_whole(footprints, device, host, placement):
        return footprints, [Home.FULL] * len(footprints.layout.chunks)
    if device.capacity is not None:
        limit = device.capacity // (_CHUNKS_AT_ONCE * max(spec.dtype.itemsize for spec in specs))
        if placement == "auto":
            homes = sum(one.kept for one in footprints.all())
            elements = sum(chunk.numel for chunk in footprints.layout.chunks)
            limit = min(limit, device.capacity * elements // (_HOMES_AT_LEAST * homes))
        footprints = takes(plan_layout(specs, world_size, chunk_size, alignment, limit))
    if home is not None:
        return footprints, [home] * len(footprints.layout.chunks)
    return footprints, first_homes(footprints, units, device, host, placement)


def _tiers(homes: Collection[Home]) -> set[str]:
    return {"host" if home is Home.HOST else "device" for home in homes}


def _refuse_overlaps(names: Mapping[nn.Parameter, str], unbuilt: Collection[nn.Parameter]) -> None:
    """Raises ConfigurationError if two parameters are one memory: in chunks they would be two."""
    at: dict[int, str] = {}
    for param, name in names.items():
        if param.numel() and not param.is_meta and param not in unbuilt:
            other = at.setdefault(param.data_ptr(), name)
            if other != name:
                raise ConfigurationError(
                    f"{other} and {name} share their memory but are two parameters (one's .data was set to the "
                    "other's?). Tie weights by assigning the Parameter itself: b.weight = a.weight."
                )


def _has_values(param: nn.Parameter) -> bool:
    return param.is_meta or param.numel() < 2 or any(param.stride())


def _keep_dtype(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of batch norms: their buffers stay in fp32, and the kernels want one dtype for both."""
    norms = (m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase))
    return {param for norm in norms for param in norm.parameters(recurse=False)}


def _require_agreement(layout: Layout, collectives: Collectives) -> None:
    if len(set(collectives.gather_objects(layout.fingerprint))) == 1:
        return
    mine = [f"{p.name}: {p.shape} {p.dtype}, trainable={p.trainable}" for p in layout.params]
    theirs = collectives.broadcast_object(mine)
    pairs = enumerate(zip_longest(mine, theirs, fillvalue="nothing"))
    first = next((f"parameter {i} is {a!r} here and {b!r} on rank 0" for i, (a, b) in pairs if a != b), None)
    raise DisagreementError(
        f"the ranks have different models: {first or 'another rank differs from rank 0'}. Build the same model, with "
        "the same settings and optimizers, on every rank."
    )
