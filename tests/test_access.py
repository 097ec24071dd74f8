"""Weights and gradients outside of a step: whole and right, or refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_gemini.core import DtypePolicy, Engine, HiddenReadError, Home, NonFiniteError, StateError, shard
from tests import cases
from tests.ranks import run_ranks

MOVED = [Home.DEVICE, Home.HOST]
MIXED = DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32)


def make(name: str = "Mlp", home: Home = Home.HOST, **options: Any) -> tuple[nn.Module, Any, Engine]:
    model = cases.build(name)
    optimizer = cases.adamw(name, model)
    ranks = dist.is_initialized()
    group, reduce_group = (dist.group.WORLD, dist.new_group()) if ranks else (None, None)
    options = {"chunk_size": 2048, "home": home, "group": group, "reduce_group": reduce_group, **options}
    return model, optimizer, shard(model, [optimizer], **options)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(4, cases.WIDTH, generator=torch.Generator().manual_seed(seed))


# Copies and states


ACTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "state_dict": lambda model: model.state_dict(),
    "state_dict of a part": lambda model: model.layers[0].state_dict(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("options", [{"home": Home.DEVICE}, {"home": Home.HOST}], ids=["device", "host"])
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_copies_of_placeholders_are_refused_and_whole_inside_summon(
    action: Callable[[nn.Module], Any], options: dict[str, Any]
) -> None:
    plain, (model, _, engine) = cases.build("Mlp"), make(**options)
    with pytest.raises(StateError, match="summon_full_params"):
        action(model)
    with engine.summon():
        found = action(model)
    if isinstance(found, bytes):
        found = pickle.loads(found)
    if isinstance(found, nn.Module):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters(), strict=True))
        torch.testing.assert_close(found(batch()), plain(batch()), rtol=0, atol=0)  # and belongs to no engine
        found.load_state_dict(found.state_dict())
    else:
        assert all(value.isfinite().all() for value in found.values())
    engine.release()


def test_kept_weights_may_be_saved_and_copied_unless_they_are_rounded() -> None:
    model, _, _ = make(home=Home.FULL)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(batch()), model(batch()))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), copied.parameters(), strict=True))
    model, _, _ = make(home=Home.FULL, policy=MIXED)
    with pytest.raises(StateError, match="rounded"):
        model.state_dict()


@pytest.mark.parametrize("home", list(Home))
def test_loading_is_refused_outside_of_summon(home: Home) -> None:
    model, _, engine = make(home=home)
    state = {key: torch.ones_like(value) for key, value in cases.build("Mlp").state_dict().items()}
    with pytest.raises(StateError, match=r"load_state_dict\(\) of .* would be lost.*writeback=True"):
        model.load_state_dict(state)
    with engine.summon(writeback=True):
        model.load_state_dict(state)
    engine.release()
    assert all(bool((p == 1).all()) for p in model.parameters())


# Writes


@pytest.mark.parametrize("home", list(Home))
@pytest.mark.parametrize("how", ["in place", "data"])
def test_writes_outside_of_summon_fail_the_next_step(home: Home, how: str) -> None:
    model, optimizer, engine = make(home=home)
    bias = model.layers[0][0].bias
    model(batch()).sum().backward()
    if how == "data":
        bias.data = torch.zeros(bias.shape)
    else:
        with engine.forward(), torch.no_grad():
            model.layers[0][0].bias.mul_(2)
    with pytest.raises(StateError, match=r"layers.0.0.bias: the parameter was changed from outside"):
        optimizer.step()


# Gradients


@pytest.mark.parametrize("home", list(Home))
def test_gradients_in_grad_say_where_they_are(home: Home) -> None:
    model, optimizer, engine = make(home=home)
    model(batch()).square().sum().backward()
    params = list(model.parameters())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in params)
    for use in (
        lambda: torch.nn.utils.clip_grad_norm_(params, 1.0),
        lambda: torch.nn.utils.clip_grad_value_(params, 1.0),
        lambda: params[0].grad.norm(),
        lambda: params[0].grad.data.norm(2),
        lambda: params[0].grad.mul_(2),
        lambda: params[0].grad + 1,
    ):
        with pytest.raises(StateError, match=r"gradient of layers\.0\.0\.\w+ is not in \.grad.*grad_norm"):
            use()
    optimizer.step()
    assert all(p.grad is None for p in params)
    engine.release()


@pytest.mark.parametrize("home", list(Home))
@pytest.mark.parametrize("declared", [True, False])
def test_what_is_done_to_grad_counts(home: Home, declared: bool) -> None:
    def train(model: nn.Module, optimizer: Any, backward: Callable[[Tensor], None]) -> None:
        for step in range(3):
            backward(model(batch(step)).square().sum())
            model.zero_grad()  # of a backward that is not to count
            backward(model(batch(step)).square().mean())
            backward(model(batch(step + 1)).square().mean())
            model.layers[0][0].weight.grad = None
            optimizer.step()
            optimizer.zero_grad()

    plain = cases.build("Mlp")
    train(plain, cases.adamw("Mlp", plain), Tensor.backward)
    model, optimizer, engine = make(home=home)

    def backward(loss: Tensor) -> None:
        if declared:
            with engine.backward():
                loss.backward()
        else:
            loss.backward()

    train(model, optimizer, backward)
    engine.release()
    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)

    model, optimizer, engine = make(home=home)
    backward(model(batch()).sum())
    model.layers[0][0].bias.grad = torch.zeros_like(model.layers[0][0].bias)
    with pytest.raises(StateError, match=r"layers.0.0.bias: \.grad was set by hand"):
        optimizer.step()


def _summoned(home: Home) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    model, optimizer, engine = make("MlpInGroups", home)
    rank = dist.get_rank() if dist.is_initialized() else 0
    model(batch(rank)).square().mean().backward()
    with engine.summon(with_grads=True):
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norms = engine.grad_norms()
    total, part = engine.grad_norm(), engine.grad_norm(module=model.layers[0])
    optimizer.step()  # the gradients are still there for the step
    engine.release()
    return grads, {k: v.clone() for k, v in norms.items()}, total, part


def _all_homes() -> list[Any]:
    return [_summoned(home) for home in Home]


@pytest.mark.parametrize("ranks", [1, 2])
def test_whole_gradients_and_norms(ranks: int) -> None:
    model = cases.build("MlpInGroups")
    sum(model(batch(rank)).square().mean() / ranks for rank in range(ranks)).backward()
    results = _all_homes() if ranks == 1 else run_ranks(_all_homes, 2)[1]
    expected = {name: p.grad for name, p in model.named_parameters()}
    for grads, norms, total, part in results:
        torch.testing.assert_close(grads, expected)
        torch.testing.assert_close(norms, {name: grad.norm() for name, grad in expected.items()})
        torch.testing.assert_close(total, torch.nn.utils.get_total_norm(expected.values()))
        inside = model.layers[0]
        torch.testing.assert_close(part, torch.nn.utils.get_total_norm([p.grad for p in inside.parameters()]))


# Reads that no hook sees


@pytest.mark.parametrize("home", MOVED)
def test_hidden_reads_are_served_and_named(home: Home) -> None:
    model, _, engine = make("WeightsInList", home, check=True)
    for seed in range(2):
        model(batch(seed)).sum().backward()
    assert engine.hidden_reads == ["a.weight", "b.weight", "c.weight"]
    engine.release()


class Late(nn.Module):
    """Reads its weights in a hidden way from the third step on."""

    def __init__(self, saves: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        self.kept, self.saves, self.calls = [self.layers[0].weight], saves, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.layers:
            x = layer(x).tanh()
        if self.calls == 3:
            x = x + (self.kept[0].square() if self.saves else self.kept[0]).mean()
        return x


@pytest.mark.parametrize("home", MOVED)
@pytest.mark.parametrize(("saves", "error"), [(True, HiddenReadError), (False, NonFiniteError)])
def test_a_late_hidden_read_fails_the_step_and_is_served_in_the_next(
    home: Home, saves: bool, error: type[Exception]
) -> None:
    torch.manual_seed(0)
    model = Late(saves)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = shard(model, [optimizer], home=home, chunk_size=1152)

    def step() -> None:
        with engine.forward("training_step"):
            loss = model(batch()).square().mean()
        engine.doubt(loss)
        with engine.backward():
            loss.backward()
        optimizer.step()

    for _ in range(2):
        step()
    with engine.summon():
        before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match="check=True"):
        step()
    with engine.summon():
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    engine.abort()
    model.calls = 2
    with pytest.warns(UserWarning, match=r"layers.0.weight: read in a way that no hook sees"):
        step()
    engine.release()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("home", MOVED)
@pytest.mark.parametrize("check", [False, True])
def test_a_loss_that_is_not_finite_of_itself_fails_its_step_and_training_goes_on(home: Home, check: bool) -> None:
    def step(factor: float) -> None:
        with engine.forward("training_step"):
            loss = model(batch()).square().mean() * factor
        engine.doubt(loss)
        with engine.backward():
            loss.backward()
        optimizer.step()

    model, optimizer, engine = make(home=home, check=check)
    for factor, error in ((1.0, None), (float("inf"), "layers.0.0.weight is not finite"), (1.0, None)):
        if error is None:
            step(factor)
        else:
            with pytest.raises(NonFiniteError, match=error if check else "Either training diverged"):
                step(factor)
    engine.release()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("home", MOVED)
def test_a_step_inside_a_scope_renews_what_is_in_use(home: Home) -> None:
    """Manual optimization: a weight was read before ``step`` and is read again after it."""

    def train(model: nn.Module, optimizer: Any, scope: Callable[[], Any]) -> list[float]:
        losses = []
        for seed in range(3):
            with scope():
                penalty = model.layers[0][0].weight.square().mean()
                (model(batch(seed)).square().mean() + penalty).backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(model(batch(seed)).square().mean().item())
        return losses

    plain = cases.build("Mlp")
    expected = train(plain, cases.adamw("Mlp", plain), nullcontext)
    model, optimizer, engine = make(home=home)
    assert train(model, optimizer, engine.forward) == expected
    engine.release()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


# What an unannounced read may look like


class Sly(nn.Module):
    """Reads kept weights in one way or another."""

    def __init__(self, read: Callable[[list[Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(cases.WIDTH, cases.WIDTH) for _ in range(8))
        self.kept, self.read = [layer.weight for layer in self.layers], read

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y).tanh()
        return y + self.read(self.kept, x)


def _checkpointed(kept: list[Tensor], x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda y: (y @ kept[4]).tanh() @ kept[1], x + 0 * kept[0].sum(), use_reentrant=True)


SLY: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "view_as": lambda kept, x: kept[0].view_as(x.new_empty(cases.WIDTH, cases.WIDTH)).mean(),
    "reshape_as": lambda kept, x: kept[2].reshape_as(kept[3]).square().mean(),
    "vmap": lambda kept, x: torch.vmap(lambda row: row.sum())(kept[3]).mean(),
    "a view kept": lambda kept, x: (kept[0].t(), *(w.square().mean() for w in kept[1:]))[0].mean(),
    "several": lambda kept, x: torch.stack([w.mean() for w in kept]).sum() + torch.cat(kept[:3]).square().mean(),
    "a logged number": lambda kept, x: (sum((w.detach() > 0).sum() for w in kept) / 1e4).float(),
    "recomputed in backward": _checkpointed,
}


@pytest.mark.parametrize("home", MOVED)
@pytest.mark.parametrize("read", SLY.values(), ids=SLY)
@pytest.mark.filterwarnings("ignore:.*read in a way that no hook sees")
def test_sly_reads(read: Callable[[list[Tensor], Tensor], Tensor], home: Home) -> None:
    results = []
    for engine_home in (None, home):
        torch.manual_seed(0)
        model = Sly(read)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
        engine = shard(model, [optimizer], home=engine_home, chunk_size=1152) if engine_home else None
        losses = []
        for seed in range(3):
            with engine.forward() if engine else nullcontext():
                loss = model(batch(seed)).square().mean()
            with engine.backward() if engine else nullcontext():
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if engine:
            engine.release()
            assert engine.store.device.used == engine.store.host.used == 0
        results.append((losses, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("home", MOVED)
def test_listing_parameters_late_or_in_an_evaluation(home: Home) -> None:
    plain, (model, _, engine) = cases.build("Mlp"), make(home=home)
    for step in range(3):
        with engine.forward("training_step"):
            model(batch())
            if step == 2:
                found = [p.detach().norm() for p in model.parameters()]
    torch.testing.assert_close(found, [p.detach().norm() for p in plain.parameters()])
    kept = [model.layers[0][0].weight]
    for step in range(3):
        with torch.no_grad(), engine.forward("validation_step"):
            model(batch())
            if step == 2:
                assert kept[0].norm() == plain.layers[0][0].weight.norm()
    engine.release()


@pytest.mark.parametrize("home", MOVED)
def test_a_view_that_a_module_returns_of_its_own_weight(home: Home) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(cases.WIDTH, cases.WIDTH) / 6)

        def forward(self) -> Tensor:
            return self.weight.t()

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.holder, self.body = Holder(), cases.build("Mlp")

        def forward(self, x: Tensor) -> Tensor:
            view = self.holder()
            return self.body(x) @ view

    results = []
    for engine_home in (None, home):
        torch.manual_seed(0)
        model = Root()
        engine = shard(model, [torch.optim.SGD(model.parameters())], home=engine_home, chunk_size=1152)
        results.append(model(batch()))
        engine.release()
    assert torch.equal(*results)


@pytest.mark.parametrize("home", MOVED)
def test_an_array_that_shares_memory_is_refused_by_name(home: Home) -> None:
    model, _, engine = make(home=home, chunk_size=1152)
    with engine.forward():
        array = model.layers[0][0].weight.detach().numpy()
    with pytest.raises(StateError, match=r"somebody shares its memory, as weight.numpy\(\) does"):
        model(batch())
    assert array.shape == model.layers[0][0].weight.shape


# More of what is done to .grad


def assert_trains_as_plain(train: Callable[[nn.Module, Any], None], home: Home, **tolerance: float) -> None:
    plain, (model, optimizer, engine) = cases.build("Mlp"), make(home=home)
    train(plain, cases.adamw("Mlp", plain))
    train(model, optimizer)
    engine.release()
    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, **tolerance)


@pytest.mark.parametrize("home", list(Home))
def test_create_graph_adds_up(home: Home) -> None:
    def train(model: nn.Module, optimizer: Any) -> None:
        for seed in range(2):
            model(batch(seed)).square().mean().backward()
            model(batch(seed + 5)).square().mean().backward(create_graph=True)
            model(batch(seed + 7)).square().mean().backward(create_graph=True)
            optimizer.step()
            model.zero_grad()

    assert_trains_as_plain(train, home, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("home", list(Home))
def test_gradients_that_are_set_by_hand_are_refused_and_zeroed_ones_count(home: Home) -> None:
    model, optimizer, _ = make(home=home)
    for param in model.parameters():
        param.grad = torch.ones(param.shape)
    with pytest.raises(StateError, match=r"\.grad was set by hand"):
        optimizer.step()

    def train(model: nn.Module, optimizer: Any) -> None:
        for seed in range(3):
            model(batch(seed)).square().mean().backward()
            if seed == 1:
                model.zero_grad(set_to_none=False)  # a step with zeros: momentum and decay go on
            optimizer.step()
            optimizer.zero_grad()

    assert_trains_as_plain(train, home, rtol=0, atol=0)
