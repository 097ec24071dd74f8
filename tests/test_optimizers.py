"""Any element-wise optimizer of torch works on flat shards to the bit; what needs whole tensors is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core import ConfigurationError, DtypePolicy, Home, shard
from lightning_gemini.core.elementwise import require_elementwise
from lightning_gemini.optim import Lion
from lightning_gemini.optim.recognise import recognise
from tests import cases

Make = Callable[[Any], Optimizer]

#: run as they are: those without a rule, and torch's own implementations where somebody asks for one
ELEMENTWISE: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW amsgrad maximize": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
}


def train(name: str, make: Make, home: Home | None, steps: int = 4) -> tuple[nn.Module, Optimizer]:
    """Plain where ``home`` is ``None``."""
    model = cases.build(name)
    optimizer = make(model.parameters())
    engine = shard(model, [optimizer], home=home, chunk_size=2048) if home else None
    for step in cases.batches(name, steps, 1):
        cases.CASES[name].loss(model, step[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    if engine:
        engine.release()
    return model, optimizer


@pytest.mark.parametrize("home", list(Home))
@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_one_rank_is_bit_exact(make: Make, home: Home) -> None:
    # parameters that get a gradient never, or at every third step, are part of it
    ours, _ = train("Unused", make, home)
    theirs, _ = train("Unused", make, None)
    for (key, value), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(value, expected), key


RULED: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW amsgrad maximize": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "Lion": lambda p: Lion(p, lr=0.001, weight_decay=0.1),
}


@pytest.mark.parametrize("home", list(Home))
@pytest.mark.parametrize("make", RULED.values(), ids=RULED)
def test_rules_are_the_optimizers_to_rounding(make: Make, home: Home) -> None:
    ours, optimizer = train("Unused", make, home)
    theirs, _ = train("Unused", make, None)
    assert recognise(optimizer, optimizer.param_groups[0]) is not None
    for (key, value), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # a thousandth of a step: where a gradient is next to nothing, Adam makes much of its last bit
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


class _ByNorm(Optimizer):
    """LAMB's idea: the update of a tensor is scaled by its norm."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"] * (param.norm() / param.grad.norm()).item())


class _Counting(Optimizer):
    """Keeps a step count in its group, as pytorch_optimizer's do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad.sign(), alpha=group["lr"] / group["step"])


REFUSED: dict[str, tuple[Make, str]] = {
    "LBFGS": (lambda p: torch.optim.LBFGS(p), "evaluates the loss several times"),
    "Muon": (lambda p: torch.optim.Muon(p), "orthogonalises whole matrices"),
    "Adafactor": (lambda p: torch.optim.Adafactor(p), "factors the second moment"),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p), "sparse gradients"),
    "_ByNorm": (lambda p: _ByNorm(p, 0.1), "not the update of the same numbers in two flat pieces"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_whole_tensor_optimizers_are_refused_by_name_and_reason(name: str) -> None:
    make, reason = REFUSED[name]
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    before = model[0].weight.detach().clone()
    with pytest.raises(ConfigurationError, match=rf"optimizer 0 \(.*{name}\) cannot update flat shards: .*{reason}"):
        shard(model, [make(model.parameters())])
    assert torch.equal(model[0].weight, before)
    assert model(torch.ones(1, 32)).isfinite().all()


def test_the_trial_touches_nothing() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    require_elementwise(optimizer, "it", torch.device("cpu"))
    assert not optimizer.state
    assert not calls
    assert optimizer.param_groups[0]["lr"] == 0
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("home", list(Home))
def test_one_step_for_the_user_whatever_the_number_of_chunks(home: Home) -> None:
    model = cases.build("Mlp")
    optimizer = _Counting(model.parameters(), 0.1)
    hooks: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: hooks.append("pre"))
    optimizer.register_step_post_hook(lambda *_: hooks.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    engine = shard(model, [optimizer], home=home, chunk_size=2048)
    assert len(engine.layout.chunks) > 3
    for _ in range(2):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
        scheduler.step()  # warns if it thinks that no step was taken
    assert optimizer.param_groups[0]["step"] == 2
    assert hooks == ["pre", "post"] * 2
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model = cases.build("Mlp")
    optimizer = cases.adamw("Mlp", model)
    engine = shard(model, [optimizer], home=Home.DEVICE, chunk_size=2048)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = model(torch.ones(4, 32)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure=closure)
    assert len(calls) == 2
    assert math.isfinite(first.item())
    assert second.item() < first.item()
    assert engine.counters.updates == 2 * len(engine.layout.chunks)


# What a rule may not be


class ClipsOverAll(torch.optim.SGD):
    """Looks at all parameters of a group at once."""

    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.1)
        return super().step(closure)


class CountsItsSteps(torch.optim.SGD):
    """Keeps on the object what belongs into the groups."""

    calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=0.1 / self.calls)


@pytest.mark.parametrize("cls", [ClipsOverAll, CountsItsSteps])
def test_rules_that_many_calls_would_change_are_refused(cls: type[Optimizer]) -> None:
    model = cases.build("Mlp")
    before = torch.get_rng_state()
    with pytest.raises(ConfigurationError, match=rf"{cls.__name__}\) cannot update flat shards"):
        shard(model, [cls(model.parameters(), lr=0.1)])
    assert torch.equal(torch.get_rng_state(), before)


class CallsSuper(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("home", list(Home))
def test_a_subclass_that_calls_super(home: Home) -> None:
    calls = []

    def make(params: Any) -> Optimizer:
        optimizer = CallsSuper(params, lr=0.01)
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        return optimizer

    ours, _ = train("Mlp", make, home)
    theirs, _ = train("Mlp", lambda p: torch.optim.AdamW(p, lr=0.01), None)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


class _Scaled(Optimizer):
    """Takes an argument in ``step``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None, scale: float = 1.0) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=scale)


def test_arguments_of_step_reach_all_chunks() -> None:
    model = cases.build("Mlp")
    optimizer = _Scaled(model.parameters())
    engine = shard(model, [optimizer], chunk_size=2048)
    before = [p.detach().clone() for p in model.parameters()]
    for call in (lambda: optimizer.step(scale=0.0), lambda: optimizer.step(None, 0.0)):
        model(torch.randn(4, 32)).sum().backward()
        call()  # type: ignore[no-untyped-call]
    assert engine.counters.updates == 2 * len(engine.layout.chunks)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("lr", [None, torch.ones(2)])
def test_a_setting_that_is_no_number_fails_before_anything_moves(lr: Any) -> None:
    model = cases.build("Mlp")
    params = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    shard(model, [optimizer], chunk_size=2048)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1]["lr"] = lr
    model(torch.randn(4, 32)).sum().backward()
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_rule_that_is_lost_with_bf16_states_is_refused_before_anything_moves() -> None:
    model = cases.build("Mlp")
    optimizer = torch.optim.AdamW(model.parameters())
    shard(model, [optimizer], chunk_size=2048, policy=DtypePolicy(state=torch.bfloat16))
    for _ in range(2):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["foreach"] = True
    model(torch.randn(4, 32)).sum().backward()
    with pytest.raises(ConfigurationError, match=r"AdamW had a rule, which keeps its states in torch\.bfloat16"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_kernel_that_cannot_be_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_GEMINI_KERNEL", "fast")
    model = cases.build("Mlp")
    with pytest.raises(ConfigurationError, match="LIGHTNING_GEMINI_KERNEL is 'fast'; it must be one of native"):
        shard(model, [torch.optim.AdamW(model.parameters())])
    assert all(p.isfinite().all() for p in model.parameters())
