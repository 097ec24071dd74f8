"""Engines under a bound, watched: what is on the device by the count of its tensors, at every moment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core import DtypePolicy, Engine, Home, OutOfBudgetError, shard
from lightning_gemini.core.memory import Tier
from tests.outcomes import group

SPLIT = DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32)
VOCAB, LENGTH = 512, 16


def language_model(layers: int = 6, hidden: int = 128) -> nn.Module:
    """A small OPT: about 1.3 million parameters in ten chunks of the default size."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers, ffn_dim=4 * hidden, num_attention_heads=4,
        word_embed_proj_dim=hidden, max_position_embeddings=32, dropout=0.0, attention_dropout=0.0,
        pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config).train()


def in_groups(model: nn.Module) -> list[Optimizer]:
    """AdamW with weight decay for matrices only."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])]


def text(seed: int) -> Tensor:
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def lm_loss(model: nn.Module, seed: int) -> Tensor:
    batch = text(seed)
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def lm_step(model: nn.Module, optimizers: Sequence[Optimizer], seed: int, backward: Any = Tensor.backward) -> float:
    loss = lm_loss(model, seed)
    backward(loss)
    optimizers[0].step()
    return loss.item()


def device_bytes(engine: Engine) -> int:
    """What lies on the emulated device, by the tensors and not by the tier's count."""
    found = 0
    updates = {u.chunk.index: u for chunks in engine.optimizers for u in chunks.updates}
    for chunk in engine.store.chunks:
        found += chunk.full.untyped_storage().nbytes()
        gradient = engine._gradients.chunks.get(chunk.index)
        if gradient is not None and gradient.buffer is not None:
            found += gradient.buffer.nbytes
        if chunk.home is Home.HOST:
            continue
        if chunk.home is Home.DEVICE:
            found += chunk.shard.nbytes
        if (master := engine.store.masters.get(chunk.index)) is not None and chunk.spec.kind.trainable:
            found += master.part.nbytes
        if gradient is not None and gradient.shard is not None:
            found += gradient.shard.nbytes
        if (update := updates.get(chunk.index)) is not None and not update.is_new:
            states = [v for segment in update.shard.segments for v in segment.state.values()]
            found += sum(v.nbytes for v in states if isinstance(v, Tensor) and v.dim())
    return found


@contextmanager
def watched(engine: Engine) -> Iterator[list[int]]:
    """Within a bound at every moment: each time that memory is taken, tensors are compared with the tiers' counts."""
    takes: list[int] = []
    take = Tier.take

    def checked(tier: Tier, nbytes: int, what: str, work: bool = False) -> None:
        take(tier, nbytes, what, work)
        takes.append(nbytes)
        assert tier.capacity is None or tier.used <= tier.capacity
        if tier is engine.store.device:
            assert device_bytes(engine) <= tier.used, f"more is on the device than is counted, with {what}"

    Tier.take = checked  # type: ignore[method-assign]
    try:
        yield takes
    finally:
        Tier.take = take  # type: ignore[method-assign]


class Moved:
    """What the counters have counted since the object was made, or since the last :meth:`since`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = copy.copy(engine.counters)

    def since(self) -> dict[str, int]:
        before, now = asdict(self._before), asdict(self._engine.counters)
        self._before = copy.copy(self._engine.counters)
        return {name: now[name] - before[name] for name in now}


@dataclass
class Outcome:
    """Of a run: what was said of each step, the weights, and the engine, released."""

    said: list[Any]
    params: dict[str, Tensor]
    engine: Engine | None = None
    need: int = 0

    def same(self, other: Outcome) -> None:
        assert self.said == other.said
        assert self.params.keys() == other.params.keys()
        for name, value in other.params.items():
            assert torch.equal(self.params[name], value), name

    def close(self, other: Outcome) -> None:
        torch.testing.assert_close(self.said, other.said, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(self.params, other.params, rtol=2e-3, atol=4e-4)


@dataclass(frozen=True)
class Scenario:
    """A training that is the same whether there is an engine or not.

    Attributes:
        build: makes the model.
        optimizers: of the model.
        train: model, optimizers and engine (``None``: plain torch) -> what is to be compared beside the weights.
        options: for ``shard``.
        chunk_size: elements.
    """

    build: Callable[[], nn.Module]
    optimizers: Callable[[nn.Module], list[Optimizer]]
    train: Callable[[nn.Module, list[Optimizer], Engine | None], list[Any]]
    options: dict[str, Any] = field(default_factory=dict)
    chunk_size: int = 2048

    def plain(self) -> Outcome:
        torch.manual_seed(0)
        model = self.build()
        said = self.train(model, self.optimizers(model), None)
        return Outcome(said, {name: p.detach() for name, p in model.named_parameters()})

    def sharded(self, **options: Any) -> Outcome:
        torch.manual_seed(0)
        model = self.build()
        optimizers = self.optimizers(model)
        options = {"chunk_size": self.chunk_size, "group": group(), **self.options, **options}
        engine = shard(model, optimizers, **options)
        with watched(engine):
            said = self.train(model, optimizers, engine)
        engine.check_model()
        engine.release()
        assert engine.store.device.used == engine.store.host.used == 0
        params = {name: p.detach() for name, p in model.named_parameters()}
        return Outcome(said, params, engine, engine.store.device.peak)

    def bounded(self, placement: str, need: int, shares: Sequence[int] = (40, 50, 60, 70, 80)) -> Outcome:
        """With as little of ``need`` as works, of these percents."""
        for share in shares:
            try:
                found = self.sharded(placement=placement, device_memory=need * share // 100)
            except OutOfBudgetError:
                continue
            assert found.engine is not None
            assert found.engine.moving
            return found
        raise AssertionError(f"it does not train with {shares[-1]}% of the {need} bytes that it needs")
