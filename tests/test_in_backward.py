"""``update="in_backward"``: the same weights, no gradient that waits, and named refusals of what needs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from lightning_gemini import GeminiPrecision, GeminiStrategy
from lightning_gemini.core import ConfigurationError, DtypePolicy, Home, NonFiniteError, StateError, UpdatePolicy, shard
from tests import cases
from tests.lightning_cases import Module, loader, trainer
from tests.placing import in_groups, language_model, lm_step
from tests.ranks import run_ranks

EARLY = UpdatePolicy("in_backward")
MIXED = DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32)
CASES = ["Mlp", "opt", "Unused", "TiedWeight", "llama_checkpoint", "FrozenMiddle", "lora_opt"]

MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "rule": lambda p: torch.optim.AdamW(p, lr=0.01),
    "as it is": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "without a rule": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def train(
    name: str, make: Callable[[Any], Optimizer], update: UpdatePolicy, home: Home, group: Any = None, steps: int = 4
) -> tuple[list[float], list[Tensor]]:
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    model = cases.build(name)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    reduces = None if group is None else dist.new_group()
    engine = shard(model, [optimizer], home=home, chunk_size=2048, update=update, group=group, reduce_group=reduces)
    losses = []
    for step in cases.batches(name, steps, ranks):
        with engine.forward():
            loss = cases.CASES[name].loss(model, step[rank])
        with engine.backward():
            loss.backward()
        if update is EARLY:
            assert all(gradient.shard is None for gradient in engine.optimizers.gradients(None))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert engine.counters.updates
    engine.release()
    assert engine.store.device.used == engine.store.host.used == 0
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("home", list(Home))
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_updates_at_the_step(name: str, make: Callable[[Any], Optimizer], home: Home) -> None:
    early, late = (train(name, make, update, home) for update in (EARLY, UpdatePolicy()))
    assert early[0] == late[0]
    assert all(torch.equal(a, b) for a, b in zip(early[1], late[1], strict=True))


def _on_two_ranks() -> None:
    for name in ("Unused", "opt", "lora_opt"):
        for home in Home:
            early, late = (train(name, MAKE["rule"], u, home, dist.group.WORLD) for u in (EARLY, UpdatePolicy()))
            assert early[0] == late[0], (name, home)
            assert all(torch.equal(a, b) for a, b in zip(early[1], late[1], strict=True)), (name, home)


def test_two_ranks() -> None:
    run_ranks(_on_two_ranks, 2)


def test_twelve_bytes_a_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16)))
    optimizer = torch.optim.AdamW(model.parameters())
    engine = shard(model, [optimizer], policy=MIXED, home=Home.FULL, update=EARLY)
    per_parameter = engine.layout.nbytes // 2
    for _ in range(3):
        model(torch.randn(4, 64).bfloat16()).sum().backward()
        optimizer.step()
    chunk = max(spec.nbytes for spec in engine.layout.chunks)
    assert engine.store.device.used - chunk <= 12 * per_parameter
    assert engine.store.device.peak - 12 * per_parameter <= 2 * chunk  # a gradient fills while one is used


class Shared(nn.Module):
    """One layer in two reentrant checkpoints: its gradient comes in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x


class Detached(nn.Module):
    """A weight whose gradients are all in before its values are needed for the last time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.first(x), self.second.weight.detach())
        return self.second(x)


@pytest.mark.parametrize("home", list(Home))
def test_a_gradient_in_parts_is_refused(home: Home) -> None:
    model = Shared()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = shard(model, [optimizer], home=home, update=EARLY)
    with pytest.raises(StateError, match=r"(?i)layer.weight.*use update='at_step'"), engine.backward():
        model(torch.randn(4, 32)).sum().backward()


@pytest.mark.parametrize("home", list(Home))
def test_a_weight_that_is_needed_after_its_update_is_refused(home: Home) -> None:
    torch.manual_seed(0)
    model = Detached()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = shard(model, [optimizer], home=home, chunk_size=1152, update=EARLY)
    with engine.forward():
        loss = model(torch.randn(4, 32)).sum()
    with (
        pytest.raises(RuntimeError, match=r"an optimizer step has changed it since|modified by an inplace"),
        engine.backward(),
    ):
        loss.backward()


def test_what_needs_waiting_gradients_is_refused_by_name() -> None:
    model = cases.build("Mlp")
    optimizer = torch.optim.AdamW(model.parameters())
    engine = shard(model, [optimizer], update=EARLY)
    for call in (
        lambda: engine.clip_grad_norm(optimizer, 1.0),
        lambda: engine.clip_grad_value(optimizer, 1.0),
        engine.grad_norm,
        engine.grad_norms,
        lambda: engine.accumulate().__enter__(),
    ):
        with pytest.raises(StateError, match="update='in_backward' each gradient is used and dropped"):
            call()
    model(torch.randn(4, 32)).sum().backward()
    with pytest.raises(StateError, match=r"layers.0.0.weight came twice before optimizer.step\(\)"):
        model(torch.randn(4, 32)).sum().backward()


def test_a_gradient_that_is_not_finite_is_found_at_the_step() -> None:
    model = cases.build("Mlp")
    optimizer = torch.optim.AdamW(model.parameters())
    shard(model, [optimizer], update=EARLY)
    (model(torch.randn(4, 32)).sum() * float("nan")).backward()
    with pytest.raises(NonFiniteError, match="it has been used already"):
        optimizer.step()


@pytest.mark.parametrize(
    ("precision", "settings", "message"),
    [
        (None, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
        (None, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (
            None,
            {"callbacks": [L.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})]},
            "AccumulationScheduler",
        ),
        (GeminiPrecision("16-mixed"), {}, r"a loss scale \(16-mixed\)"),
        (GeminiPrecision("bf16-mixed", nonfinite="skip"), {}, "nonfinite='skip'"),
    ],
)
def test_trainers_that_need_waiting_gradients(precision: Any, settings: dict[str, Any], message: str) -> None:
    module = Module("Mlp")
    with pytest.raises(ConfigurationError, match=f"update='in_backward' cannot work with .*{message}"):
        trainer(GeminiStrategy(update="in_backward", precision_plugin=precision), **settings).fit(module, loader())
    assert all(p.isfinite().all() for p in module.parameters())


def test_under_a_trainer() -> None:
    results = []
    for strategy in ("auto", GeminiStrategy(update="in_backward")):
        module = Module("Mlp")
        trainer(strategy).fit(module, loader())
        results.append(list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_of_another_optimizer_cannot_be_dropped() -> None:
    """A GAN that does not freeze its discriminator while its generator learns."""
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.ModuleList([generator, discriminator])
    ours, theirs = (torch.optim.AdamW(module.parameters()) for module in model)
    shard(model, [ours, theirs], update=EARLY)
    discriminator(generator(torch.randn(2, 8))).sum().backward()
    ours.step()
    with pytest.raises(StateError, match=r"another optimizer's, keep these parameters out of it with self.toggle_opt"):
        theirs.zero_grad()


@pytest.mark.parametrize(("device", "host"), [(45, 90), (60, 60)])
def test_homes_change_places_in_tight_host_memory(device: int, host: int) -> None:
    """States are there before the plan is: a home goes to the host when another one has left it."""
    model = language_model(layers=4, hidden=64)
    need = 12 * sum(param.numel() for param in model.parameters())
    optimizers = in_groups(model)
    memory = {"device_memory": need * device // 100, "host_memory": need * host // 100}
    engine = shard(model, optimizers, placement="auto", policy=MIXED, update=EARLY, **memory)
    for seed in range(4):
        lm_step(model, optimizers, seed)
    assert {chunk.home for chunk in engine.store.chunks} == {Home.FULL, Home.HOST}
    engine.release()
