"""Norms of gradients that lie in shards, and clipping by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.store import Store


def total_norm(store: Store, gradients: Sequence[ChunkGradient], norm_type: float) -> Tensor:
    """The p-norm over all ranks and all parameters of ``gradients``; an fp32 scalar on the device."""
    local = [_norm(g.shard, norm_type, store.device.device) for g in gradients if g.shard is not None]
    return _over_ranks(store, _combine(local, norm_type, store.device.device).reshape(1), norm_type)[0]


def norms_by_name(store: Store, gradients: Sequence[ChunkGradient], norm_type: float) -> dict[str, Tensor]:
    """The p-norm of each parameter's gradient that there is, over all ranks; fp32 scalars on the device."""
    device = store.device.device
    names, local = [], []
    for gradient in gradients:
        for slot, (name, span) in enumerate(zip(gradient.chunk.names, gradient.spans, strict=True)):
            if gradient.shard is not None and gradient.used[slot]:
                names.append(name)
                local.append(_norm(gradient.shard[span.start : span.stop], norm_type, device))
    if not names:
        return {}
    return dict(zip(names, _over_ranks(store, torch.stack(local), norm_type), strict=True))


def clip_by_norm(gradients: Sequence[ChunkGradient], norm: Tensor, max_norm: float) -> None:
    """Scales the shards as ``torch.nn.utils.clip_grad_norm_`` scales gradients whose norm is ``norm``."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        if gradient.shard is not None:
            gradient.shard.mul_(factor.to(gradient.shard.device))


def clip_by_value(gradients: Sequence[ChunkGradient], clip_value: float) -> None:
    """Clamps each element of the shards to ``[-clip_value, clip_value]``."""
    for gradient in gradients:
        if gradient.shard is not None:
            gradient.shard.clamp_(-clip_value, clip_value)


def _norm(part: Tensor, norm_type: float, device: torch.device) -> Tensor:
    if not part.numel():
        return torch.zeros((), device=device)
    wide = torch.promote_types(part.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(part, norm_type, dtype=wide)
    return norm.real.to(device, torch.float32)


def _combine(norms: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    if not norms:
        return torch.zeros((), device=device)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), norm_type)
    return norm


def _over_ranks(store: Store, norms: Tensor, norm_type: float) -> Tensor:
    """``norms`` (1-d) of each rank's part -> those of the whole."""
    collectives = store.collectives
    if norm_type != float("inf"):
        return collectives.sum(norms**norm_type) ** (1 / norm_type)
    # one row a rank: the collective there is sums
    every = torch.zeros(collectives.world_size, len(norms), device=norms.device)
    every[collectives.rank] = norms
    return collectives.sum(every).amax(0)
