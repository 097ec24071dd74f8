"""The engine's rules: what is moved and counted, what is refused, what a failure leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gemini.core import (
    ChunkState,
    ConfigurationError,
    Engine,
    Home,
    OutOfBudgetError,
    StaleGraphError,
    StateError,
    shard,
)
from tests import cases

MOVED = [Home.DEVICE, Home.HOST]


def make(
    name: str = "Mlp", home: Home = Home.DEVICE, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Engine]:
    model = cases.build(name)
    optimizer = cases.adamw(name, model)
    options = {"chunk_size": 2048, "home": home, **options}
    return model, optimizer, shard(model, [optimizer], **options)


def step(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    batch = cases.CASES[name].batch(torch.Generator().manual_seed(seed))
    cases.CASES[name].loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def straight(units: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(units)))


# What is moved


@pytest.mark.parametrize("home", MOVED)
def test_a_straight_model_unshards_every_chunk_twice_less_those_at_the_turn(home: Home) -> None:
    model = straight(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = shard(model, [optimizer], home=home, chunk_size=1088, prefetch=0)
    assert len(engine.layout.chunks) == 8
    # recorded, the last two of the forward are still there when the backward begins with them; planned, there is room
    # for three beside the last one
    for turn in (2, 4, 4):
        before = copy.copy(engine.counters)
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
        assert engine.counters.unshards - before.unshards == 2 * 8 - turn
        shard_bytes = engine.layout.nbytes
        fetched = engine.counters.fetched_bytes - before.fetched_bytes
        assert fetched == ((16 - turn) * 1088 * 4 if home is Home.HOST else 0)
        assert engine.counters.offloaded_bytes - before.offloaded_bytes == (shard_bytes if home is Home.HOST else 0)


def test_kept_chunks_are_never_moved() -> None:
    model, optimizer, engine = make("opt", Home.FULL)
    for _ in range(2):
        step("opt", model, optimizer)
    assert engine.counters.unshards == engine.counters.reshards == 0
    assert not engine.moving


def test_idle_chunks_are_freed_oldest_first() -> None:
    model = straight(5)
    engine = shard(model, home=Home.DEVICE, chunk_size=1088)
    states = []
    with torch.no_grad(), engine.forward():
        model(torch.randn(1, 32))
        states += [chunk.state for chunk in engine.store.chunks]
    assert states == [ChunkState.FREE] * 3 + [ChunkState.HELD] * 2


def test_a_freed_parameter_keeps_its_shape_reads_nan_and_refuses_writes() -> None:
    model = straight(4)
    parameter = model[0].weight
    shard(model, home=Home.DEVICE, chunk_size=1088)
    assert parameter is model[0].weight
    assert parameter.shape == (32, 32)
    assert parameter.numel() == 1024
    assert parameter.isnan().all()
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        parameter.add_(1)


@pytest.mark.parametrize("home", MOVED)
def test_memory_stays_within_the_budget_and_is_counted(home: Home) -> None:
    model = straight(12)
    optimizer = torch.optim.AdamW(model.parameters())
    chunk = 1088 * 4
    # two idle chunks and one in use, the gradient of one and, on the device, everything that an update needs
    budget = 3 * chunk + (12 * 4 * chunk if home is Home.DEVICE else chunk)
    engine = shard(model, [optimizer], home=home, chunk_size=1088, device_memory=budget)
    for _ in range(2):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
    assert engine.store.device.peak <= budget


def test_a_budget_that_is_too_small_names_the_unit_and_changes_nothing() -> None:
    model = straight(4)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    engine = shard(model, [optimizer], home=Home.HOST, chunk_size=1088, device_memory=1000)
    with pytest.raises(OutOfBudgetError, match=r"chunk 0 for 0 needs 4.25 KiB of device memory[\s\S]*device_memory"):
        model(torch.randn(4, 32))
    engine.release()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_frozen_chunks_have_no_gradient_and_no_state() -> None:
    model, optimizer, engine = make("FrozenBackbone", Home.FULL)
    step("FrozenBackbone", model, optimizer)
    trainable = sum(chunk.nbytes for chunk in engine.layout.chunks if chunk.kind.trainable)
    # gradients wait in buffers for the next backward
    rest = engine.layout.nbytes + trainable
    assert rest + 2 * 33 * 8 * 4 <= engine.store.device.used <= rest + 2 * trainable + 64


# What a step may be


@pytest.mark.parametrize("home", list(Home))
def test_a_backward_after_the_step_is_refused(home: Home) -> None:
    model, optimizer, _ = make("Mlp", home)
    loss = model(torch.randn(4, 32)).square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    expected = StaleGraphError if home is not Home.FULL else RuntimeError
    with pytest.raises(expected, match=r"optimizer step has changed|modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("home", list(Home))
def test_backward_twice_through_one_graph(home: Home) -> None:
    plain = cases.build("Mlp")
    model, optimizer, engine = make("Mlp", home)
    x = torch.randn(4, 32)
    for module in (plain, model):
        loss = module(x).square().mean()
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    torch.testing.assert_close(engine.grad_norm(), norm)
    optimizer.step()


@pytest.mark.parametrize("home", list(Home))
def test_accumulation_sums_micro_batches(home: Home) -> None:
    plain = cases.build("Mlp")
    reference = cases.adamw("Mlp", plain)
    model, optimizer, engine = make("Mlp", home)
    generator = torch.Generator().manual_seed(0)
    for window in (3, 3, 2):
        for index in range(window):
            x = cases.floats(generator)
            (plain(x).square().mean() / 3).backward()
            if index + 1 < window:
                with engine.accumulate():
                    (model(x).square().mean() / 3).backward()
            else:
                (model(x).square().mean() / 3).backward()
        for each in (reference, optimizer):
            each.step()
            each.zero_grad()
    engine.release()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_zero_grad_forgets_gradients() -> None:
    model, optimizer, engine = make()
    model(torch.randn(4, 32)).sum().backward()
    assert engine.grad_norm() > 0
    optimizer.zero_grad()
    assert engine.grad_norm() == 0
    before = [value.clone() for _, value in engine._summoner.values(range(8), torch.device("cpu"))]
    optimizer.step()
    after = [value for _, value in engine._summoner.values(range(8), torch.device("cpu"))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("name", ["MlpInGroups", "BareRoot", "Unused"])
def test_clipping_by_norm(name: str, norm_type: float) -> None:
    plain = cases.build(name)
    model, optimizer, engine = make(name)
    batch = cases.floats(torch.Generator().manual_seed(0)) * 50
    for module in (plain, model):
        cases.square(module, batch).backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5, norm_type)
    got = engine.clip_grad_norm(optimizer, 0.5, norm_type)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        engine.grad_norm(optimizer, norm_type),
        torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None], norm_type),
    )


def test_clipping_by_value() -> None:
    plain = cases.build("Mlp")
    model, optimizer, engine = make("Mlp")
    batch = cases.floats(torch.Generator().manual_seed(0)) * 50
    for module in (plain, model):
        cases.square(module, batch).backward()
    torch.nn.utils.clip_grad_value_(plain.parameters(), 0.01)
    engine.clip_grad_value(optimizer, 0.01)
    torch.testing.assert_close(engine.grad_norm(), torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]))


# Failures


@pytest.mark.parametrize("home", list(Home))
@pytest.mark.parametrize("where", ["forward", "backward", "recompute", "hook"])
def test_an_exception_leaves_weights_and_the_next_step_is_right(home: Home, where: str) -> None:
    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ValueError("boom")

    class Trap(nn.Module):
        armed = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.armed and (
                where == "forward" or (where == "recompute" and torch._C._current_graph_task_id() != -1)
            ):
                raise ValueError("boom")
            return Bomb.apply(x) if self.armed and where == "backward" else x

    def build() -> tuple[nn.Module, Trap]:
        torch.manual_seed(0)
        trap = Trap()
        half = nn.Sequential(nn.Linear(32, 32), trap, nn.Linear(32, 32))
        return nn.Sequential(nn.Linear(32, 32), half, nn.Linear(32, 32)), trap

    def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = model[0](x)
        y = checkpoint(model[1], y, use_reentrant=False) if where == "recompute" else model[1](y)
        return model[2](y).square().mean()

    plain, _ = build()
    model, trap = build()
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, foreach=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    engine = shard(model, [optimizer], home=home, chunk_size=1152)
    x = torch.randn(4, 32)

    def once() -> None:
        with engine.forward():
            loss = run(model, x)
        if where == "hook" and trap.armed:
            loss.register_hook(lambda grad: 1 / 0)
        with engine.backward():
            loss.backward()

    once()
    optimizer.step()
    trap.armed = True
    with pytest.raises((ValueError, ZeroDivisionError)):
        once()
    trap.armed = False
    optimizer.zero_grad()
    once()
    optimizer.step()
    engine.release()
    for _ in range(2):
        run(plain, x).backward()
        reference.step()
        reference.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("home", list(Home))
def test_an_exception_in_a_plain_backward_is_noticed(home: Home) -> None:
    """Without engine.backward() nobody reports it."""
    model, optimizer, engine = make("Mlp", home)
    loss = model(torch.randn(4, 32)).sum()
    model.layers[1][0].weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    model.layers[1][0].weight._backward_hooks.clear()
    optimizer.zero_grad()
    step("Mlp", model, optimizer)
    plain = cases.build("Mlp")
    step("Mlp", plain, cases.adamw("Mlp", plain))
    engine.release()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_step_that_fails_puts_the_parameters_back() -> None:
    model, optimizer, _ = make()
    model(torch.randn(4, 32)).sum().backward()
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


def test_a_new_parameter_group_is_refused() -> None:
    model, optimizer, _ = make()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    model(torch.randn(4, 32)).sum().backward()
    with pytest.raises(StateError, match=r"had 1 parameter groups.*has 2 now"):
        optimizer.step()


# Summoning and releasing


@pytest.mark.parametrize("home", list(Home))
def test_summon_shows_and_keeps_whole_parameters(home: Home) -> None:
    model, _, engine = make("TiedWeight", home)
    plain = cases.build("TiedWeight")
    with engine.summon():
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        model.embed.weight.data.add_(100)  # not kept
    with engine.summon(writeback=True), torch.no_grad():
        model.embed.weight.mul_(2)
        model.body.layers[0][0].bias.data = torch.ones(48)
    with torch.no_grad():
        plain.embed.weight.mul_(2)
        plain.body.layers[0][0].bias.fill_(1)
    x = torch.randint(0, cases.VOCAB, (2, 5))
    assert torch.equal(model(x), plain(x))
    with engine.summon(model.body):
        assert model(x).isfinite().all() or home is not Home.FULL  # the rest is not there
    assert torch.equal(model(x), plain(x))


def test_summon_is_refused_inside_a_step() -> None:
    model, _, engine = make()
    with (
        pytest.raises(StateError, match="inside a forward or a backward"),
        engine.forward(),
        engine.summon(),
    ):
        pass
    assert model(torch.randn(2, 32)).isfinite().all()


@pytest.mark.parametrize("home", list(Home))
def test_release_gives_an_ordinary_model_back(home: Home) -> None:
    model, optimizer, engine = make("opt", home)
    step("opt", model, optimizer)
    engine.release()
    engine.release()
    assert not model._forward_pre_hooks
    assert all(type(module._parameters) is dict for module in model.modules())
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(list(model.parameters()))
    again = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    step("opt", model, optimizer)
    step("opt", again, torch.optim.AdamW(again.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(StateError, match="released"), engine.forward():
        pass


def test_a_copy_belongs_to_no_engine() -> None:
    model, _, engine = make()
    with engine.summon():
        twin = copy.deepcopy(model)
    assert type(twin.layers[0][0]._parameters) is dict


# What the model may not do meanwhile


def test_replaced_parameters_are_refused_by_name() -> None:
    model, _, engine = make()
    with pytest.raises(StateError, match=r"'weight' of layers.0.0 was replaced"):
        model.layers[0][0].weight = nn.Parameter(torch.ones(48, 32))
    with pytest.raises(StateError, match=r"'bias' of layers.0.0"):
        del model.layers[0][0].bias
    model.layers[1] = nn.Linear(32, 32)
    with pytest.raises(ConfigurationError, match=r"new: layers.1.weight, layers.1.bias; gone: layers.1.0.weight"):
        engine.check_model()


def test_reads_outside_a_step_move_nothing() -> None:
    model, _, engine = make()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape[1] in (32, 48)
    assert engine.counters.unshards == 0


def test_a_method_call_inside_a_scope_finds_its_weights() -> None:
    model, _, engine = make("OtherMethod")
    with engine.forward("generate"), torch.no_grad():
        assert model.coder.decode(torch.ones(1, 32)).isfinite().all()
    assert all(chunk.pins == 0 for chunk in engine.store.chunks)


def test_a_unit_may_be_called_without_the_root() -> None:
    model, optimizer, _ = make()
    y = model.layers[0](torch.randn(4, 32))
    y.sum().backward()
    optimizer.step()


def test_units_can_be_coarser() -> None:
    model = cases.build("opt")
    engine = shard(model, unit_modules=["OPTDecoderLayer"], home=Home.DEVICE)
    names = [unit.name for unit in engine.units]
    assert "model.decoder.layers.0" in names
    assert "model.decoder.layers.0.fc1" not in names
    with pytest.raises(ConfigurationError, match=r"unit_modules names 'Nothing'.*OPTDecoderLayer"):
        shard(cases.build("opt"), unit_modules=["Nothing"])


def test_embedding_with_sparse_gradients_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 32, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shard(model, [optimizer])
    with pytest.raises(ConfigurationError, match=r"gradient of 0.weight is sparse.*sparse=False"):
        model(torch.tensor([1])).sum().backward()


def test_inference_mode_allocates_nothing_that_a_later_step_cannot_use() -> None:
    model, optimizer, engine = make("opt", Home.HOST)
    batch = cases.tokens(torch.Generator().manual_seed(0))
    with torch.inference_mode(), engine.forward("validation"):
        model(input_ids=batch)
    step("opt", model, optimizer)
    plain = cases.build("opt")
    step("opt", plain, cases.adamw("opt", plain))
    engine.release()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_several_optimizers_update_what_is_theirs() -> None:
    def train(sharded: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
        first = torch.optim.AdamW(model["a"].parameters(), lr=0.1, foreach=False)
        second = torch.optim.SGD(model["b"].parameters(), lr=0.1, momentum=0.9)
        engine = shard(model, [first, second], home=Home.DEVICE, chunk_size=1152) if sharded else None
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            F.mse_loss(model["b"](model["a"](x)), x).backward()
            first.step()
            first.zero_grad()
            second.zero_grad()  # its gradients are thrown away
            F.mse_loss(model["b"](model["a"](x)), x).backward()
            second.step()
            first.zero_grad()
            second.zero_grad()
        if engine is not None:
            engine.release()
        return model

    for ours, theirs in zip(train(True).parameters(), train(False).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_scheduler_and_changed_settings_are_alive() -> None:
    def train(sharded: bool) -> nn.Module:
        model = cases.build("MlpInGroups")
        optimizer = cases.adamw("MlpInGroups", model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        engine = shard(model, [optimizer], chunk_size=2048) if sharded else None
        for index in range(4):
            step("Mlp", model, optimizer, index)
            scheduler.step()
            optimizer.param_groups[0]["betas"] = (0.8, 0.9)
        if engine is not None:
            engine.release()
        return model

    for ours, theirs in zip(train(True).parameters(), train(False).parameters(), strict=True):
        assert torch.equal(ours, theirs)
