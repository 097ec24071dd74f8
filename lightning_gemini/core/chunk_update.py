"""One chunk as an optimizer updates it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core.blocks import bits, in_blocks, init_state
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.masters import Master
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.segments import Segment, SegmentedShard
from lightning_gemini.core.state_width import rule_for, suits_rules
from lightning_gemini.core.store import Store
from lightning_gemini.optim.kernel import kernel_for
from lightning_gemini.optim.operands import Operands
from lightning_gemini.optim.rule import Rule, count_step


class ChunkUpdate:
    """The update of one chunk's shard, in segments: by a rule in one pass, or by the user's optimizer object.

    Args:
        store: the chunks.
        gradient: the chunk's.
        optimizer: the user's; the chunk is of its parameter group ``chunk.spec.kind.group``.
        policy: the dtypes.

    Attributes:
        state_bytes: what the optimizer's state of this rank's part takes.
    """

    def __init__(self, store: Store, gradient: ChunkGradient, optimizer: Optimizer, policy: DtypePolicy) -> None:
        self.chunk = gradient.chunk
        self.gradient = gradient
        self.optimizer = optimizer
        self._store = store
        self._policy = policy
        self.state_bytes = 0
        self._origin = store.collectives.rank * self.chunk.own.numel()
        self._segmented: SegmentedShard | None = None
        self._ready: list[Segment] = []  # for a rule
        self._made: dict[Segment, tuple[Tensor, ...]] = {}
        self._transient_bytes = 0
        self._offered: list[tuple[Segment, nn.Parameter]] = []
        params, group = self.chunk.params, self.chunk.spec.kind.group or 0
        self._bits = bits(optimizer, group, params) if in_blocks(optimizer) else [0] * len(params)

    @cached_property
    def master(self) -> Master | None:
        """The chunk's master; found when it is first needed, which for a frozen chunk may be late or never."""
        return self._store.bring_master(self.chunk)

    @property
    def shard(self) -> SegmentedShard:
        """The shard, cut into segments; waits for an update that is under way."""
        device = self.chunk.shard.device
        if self._segmented is None:
            self._segmented = SegmentedShard(self.gradient.spans, device, self._bits)
        return self._segmented

    @property
    def _tier(self) -> Tier:
        return self._store.tier_of(self.chunk)

    @property
    def is_new(self) -> bool:
        """Whether there has been neither an update nor any state of the optimizer."""
        return self._segmented is None

    @property
    def active(self) -> bool:
        """Whether there is a gradient to update with."""
        return self.gradient.shard is not None and any(self.gradient.used)

    @property
    def rule(self) -> Rule | None:
        """The rule that does what the optimizer does, if there is one and the chunk's dtype is one of its own.

        Raises:
            ConfigurationError: there is none any more, but states that only a rule can go on from.
        """
        rule, dtype = rule_for(self.optimizer, self.chunk.spec, self._policy), self.chunk.spec.kind.dtype
        if rule is None and self._policy.state != torch.float32 and suits_rules(dtype, self._policy):
            raise ConfigurationError(
                f"{type(self.optimizer).__name__} had a rule, which keeps its states in {self._policy.state}, but its "
                "settings have changed so that it has none any more (foreach, capturable, differentiable, or a tensor "
                "on the device or of betas). Put them back, or keep states in fp32."
            )
        return rule

    @property
    def _group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[self.chunk.spec.kind.group or 0]

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of element-wise states."""
        if self.rule is not None:
            return self._policy.state
        return torch.float32 if self._policy.needs_master(self.chunk.spec.kind.dtype) else self.chunk.spec.kind.dtype

    def prepare(self, rule: Rule) -> None:
        """Makes the states that ``rule`` lacks, aside; before anything is updated, since it may fail.

        Raises:
            OutOfBudgetError: there is no room for them.
        """
        _ = self.master
        self._ready = self.shard.select(self.gradient.used)
        for segment in self._ready:
            missing = sum(segment.state.get(name) is None for name in rule.state_names)
            if missing:
                self._made[segment] = self._make(rule, segment, missing * segment.numel * self._policy.state.itemsize)

    def _make(self, rule: Rule, segment: Segment, nbytes: int) -> tuple[Tensor, ...]:
        like = self.chunk.shard[segment.start : segment.stop]
        self._take(nbytes)
        try:
            with torch.inference_mode(False):
                return self._tier.allocate(
                    lambda: rule.states(dict(segment.state), like, self._policy.state), nbytes, self._what
                )
        except BaseException:
            self._tier.give(nbytes)
            self.state_bytes -= nbytes
            raise

    def job(self, rule: Rule) -> Callable[[], None]:
        """The update by ``rule`` in one pass, with the settings and the gradient of now; after :meth:`prepare`.

        It may run later and in another thread, before anybody else looks at the shard, the master or the states.
        """
        grad, factor = self.gradient.shard, self.gradient.factor
        assert grad is not None
        kernel = kernel_for(grad.device)
        runs = []
        for segment in self._ready:
            start, stop = segment.start, segment.stop
            scalars = rule.scalars(self._group, segment.state)
            segment.state.update(zip(rule.state_names, self._made.pop(segment, ()), strict=False))
            operands = Operands(
                shard=self.chunk.shard[start:stop],
                master=None if self.master is None else self.master.part[start:stop],
                grad=grad[start:stop],
                factor=factor,
                limit=self.gradient.limit,
                states=[segment.state[name] for name in rule.state_names],
                seed=self._seed(rule, segment),
                first=self._origin + start,
            )
            runs.append((scalars, operands))

        def run() -> None:
            for scalars, operands in runs:
                kernel.update(rule, scalars, operands)

        return run

    def offer(self) -> list[nn.Parameter]:
        """What the optimizer object sees in the place of its parameters, with gradients and states in their places."""
        for segment in self.shard.select(self.gradient.used):
            start, stop = segment.start, segment.stop
            shard = self.chunk.shard
            values = shard[start:stop] if self.master is None else self.master.values(shard, start, stop)
            grad = self.gradient.scaled(start, stop).to(values.dtype)
            flat = nn.Parameter(values.detach(), requires_grad=True)
            flat.grad = grad
            self._count_transient(values, grad)
            if segment.state:
                self.optimizer.state[flat] = segment.state
            elif segment.bits:
                init_state(self.optimizer, self._group, flat, segment.bits)
            self._offered.append((segment, flat))
        return [flat for _, flat in self._offered]

    def take_back(self) -> None:
        """After the optimizer's step: takes the states, and brings what has changed into the shard."""
        fresh = any(not segment.state for segment, _ in self._offered)
        for segment, flat in self._offered:
            segment.state = self.optimizer.state.pop(flat, {})
            if self.master is not None:
                self.master.put(self.chunk.shard, segment.start, flat.detach())
        self.withdraw()
        if fresh:
            self.count_state()

    def withdraw(self) -> None:
        """Nothing is offered any more, and what was made aside goes."""
        if self._made:
            self._made.clear()
            self.count_state()
        for _, flat in self._offered:  # of a step that failed
            self.optimizer.state.pop(flat, None)
        self._offered = []
        self._tier.give(self._transient_bytes, work=True)
        self._transient_bytes = 0

    def _count_transient(self, values: Tensor, grad: Tensor) -> None:
        """Counts what is only there for this update: values joined from their halves, a gradient in another dtype."""
        kept = {self.chunk.shard.untyped_storage()._cdata}
        kept |= {part.untyped_storage()._cdata for part in (self.gradient.shard,) if part is not None}
        kept |= {self.master.part.untyped_storage()._cdata} if self.master is not None else set()
        nbytes = sum(t.nbytes for t in (values, grad) if t.untyped_storage()._cdata not in kept)
        self._tier.take(nbytes, f"the update of chunk {self.chunk.index}", work=True)
        self._transient_bytes += nbytes

    def count_state(self) -> None:
        """Counts the optimizer's state on the tier where it lives, after it has been made or replaced."""
        states = [value for segment in self.shard.segments for value in segment.state.values()]
        tensors = (value for value in states if isinstance(value, Tensor) and value.dim())
        nbytes = {value.data_ptr(): value.nbytes for value in tensors}  # what segments share counts once
        self._tier.give(self.state_bytes)
        self.state_bytes = 0
        self._take(sum(nbytes.values()))

    def move(self, tier: Tier) -> None:
        """Moves the optimizer's state to another tier.

        Raises:
            OutOfBudgetError: there is no room; nothing has moved.
        """
        if self.is_new:
            return
        tier.take(self.state_bytes, self._what)
        try:
            tier.allocate(lambda: self.shard.move(tier.device), self.state_bytes, self._what)
        except BaseException:
            tier.give(self.state_bytes)
            raise
        other = self._store.host if tier is self._store.device else self._store.device
        other.give(self.state_bytes)

    def forget_state(self) -> None:
        """Drops the optimizer's state."""
        if not self.is_new:
            self.shard.segments.clear()
            self.count_state()

    @property
    def _what(self) -> str:
        return f"the optimizer state of chunk {self.chunk.index}"

    def _take(self, nbytes: int) -> None:
        self._tier.take(nbytes, self._what)
        self.state_bytes += nbytes

    def _seed(self, rule: Rule, segment: Segment) -> int:
        """Of the noise that rounds bf16 states: another one at each step, and the same one in a resumed run."""
        if self._policy.state == torch.float32 or not rule.state_names:
            return 0
        step = segment.state["step"].item() if rule.counts_steps else count_step(segment.state)
        return int(step) * len(self._store.chunks) + self.chunk.index
