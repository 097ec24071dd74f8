"""Norms of gradients that lie in shards, and clipping by them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lightning_gemini.core.ballot import Ballot
from lightning_gemini.core.chunk_gradient import ChunkGradient, square_sum
from lightning_gemini.core.store import Store


class Norms:
    """Norms over all ranks, and clipping; all ranks have to call.

    Args:
        store: the chunks.
        ballot: makes the ranks agree on which parameters have gradients.
    """

    def __init__(self, store: Store, ballot: Ballot) -> None:
        self._store = store
        self._ballot = ballot

    def total(self, gradients: Sequence[ChunkGradient], norm_type: float) -> Tensor:
        """The p-norm over all parameters of ``gradients``; an fp32 scalar on the device."""
        self._ballot.agree(gradients)
        device = self._store.device.device
        local = [_chunk_norm(g, norm_type, device) for g in gradients if g.shard is not None]
        return _over_ranks(self._store, _combine(local, norm_type, device).reshape(1), norm_type)[0]

    def by_name(self, gradients: Sequence[ChunkGradient], norm_type: float) -> dict[str, Tensor]:
        """The p-norm of each parameter's gradient that there is; fp32 scalars on the device."""
        self._ballot.agree(gradients)
        device = self._store.device.device
        names, local = [], []
        for gradient in gradients:
            for slot, (name, span) in enumerate(zip(gradient.chunk.names, gradient.spans, strict=True)):
                if gradient.shard is not None and gradient.used[slot]:
                    names.append(name)
                    local.append(_norm(gradient.scaled(span.start, span.stop), norm_type, device))
        if not names:
            return {}
        return dict(zip(names, _over_ranks(self._store, torch.stack(local), norm_type), strict=True))

    def of(self, names: Collection[str], gradients: Sequence[ChunkGradient], norm_type: float) -> Tensor:
        """The p-norm over the named parameters; an fp32 scalar on the device."""
        parts = [norm for name, norm in self.by_name(gradients, norm_type).items() if name in names]
        return _combine(parts, norm_type, self._store.device.device)

    def clip(self, gradients: Sequence[ChunkGradient], max_norm: float, norm_type: float) -> Tensor:
        """Scales ``gradients``, when they are next read, as ``torch.nn.utils.clip_grad_norm_`` does.

        Returns:
            the norm before; an fp32 scalar on the device.
        """
        norm = self.total(gradients, norm_type)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        shards = [(gradient, gradient.shard) for gradient in gradients if gradient.shard is not None]
        # once for each tier, not for each chunk: what goes to the host has to be waited for
        factors = {device: factor.to(device) for device in {shard.device for _, shard in shards}}
        for gradient, shard in shards:
            gradient.clip_by(factors[shard.device])
        return norm

    def clamp(self, gradients: Sequence[ChunkGradient], limit: float) -> None:
        """Clamps each element of ``gradients``, when it is next read, to ``[-limit, limit]``."""
        self._ballot.agree(gradients)
        for gradient in gradients:
            gradient.clamp(limit)


def _chunk_norm(gradient: ChunkGradient, norm_type: float, device: torch.device) -> Tensor:
    if norm_type != 2 or gradient.clamped:
        return _norm(gradient.scaled(), norm_type, device)
    norm = square_sum(gradient).sqrt() * gradient.factor
    return norm.to(device, torch.float32)


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
