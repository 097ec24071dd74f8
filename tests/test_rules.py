"""The rules do what torch's optimizers do; which optimizers have one; Lion; masters; the loss scale."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from lightning_gemini.optim import Lion
from lightning_gemini.optim.kernel import Kernel
from lightning_gemini.optim.loss_scale import LossScale
from lightning_gemini.optim.masters import join, low_half, round_to_compute
from lightning_gemini.optim.native import NativeKernel, UnavailableError
from lightning_gemini.optim.operands import Operands
from lightning_gemini.optim.recognise import recognise
from lightning_gemini.optim.tensor_kernel import TensorKernel

STEPS = 20
NUMEL = 1003  # vectors and a rest
EPS = torch.finfo(torch.float32).eps

#: Optimizers, and whether every bit is torch's. Where the rule has a square root it is not: torch's is a library's,
#: right but for the last bit.
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any], bool]] = {
    "adamw": (AdamW, {}, False),
    "adamw, no decay": (AdamW, {"weight_decay": 0.0}, False),
    "adamw, amsgrad": (AdamW, {"amsgrad": True}, False),
    "adamw, maximize": (AdamW, {"maximize": True, "betas": (0.4, 0.95), "eps": 1e-3}, False),
    "adamw, tensor lr": (AdamW, {"lr": torch.tensor(1e-2)}, False),
    "adam": (Adam, {}, False),
    "adam, l2": (Adam, {"weight_decay": 0.1}, False),
    "adam, l2, amsgrad, maximize": (Adam, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}, False),
    "adam, decoupled": (Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, False),
    "sgd": (SGD, {}, True),
    "sgd, l2, maximize": (SGD, {"weight_decay": 0.1, "maximize": True}, True),
    "momentum": (SGD, {"momentum": 0.9}, True),
    "momentum, l2, dampening": (SGD, {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3}, True),
    "momentum, maximize": (SGD, {"momentum": 0.9, "maximize": True}, True),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, True),
    "adagrad": (Adagrad, {}, False),
    "adagrad, all": (
        Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "maximize": True},
        False,
    ),
    "lion": (Lion, {}, True),
    "lion, all": (Lion, {"weight_decay": 0.1, "maximize": True, "betas": (0.3, 0.8)}, True),
}


@pytest.fixture(params=["eager", "native"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    if request.param == "eager":
        return TensorKernel(compiled=False)
    try:
        return NativeKernel()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch computes without fma here")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rule_is_the_optimizer(name: str, kernel: Kernel) -> None:
    kind, keywords, exact = OPTIMIZERS[name]
    plain = {} if kind is Lion else {"foreach": False}
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(NUMEL))
    shard, state = param.detach().clone(), {}
    optimizer = kind([param], **{"lr": 1e-2, **keywords, **plain})
    group = optimizer.param_groups[0]
    group["foreach"] = None
    travelled = torch.zeros(NUMEL)
    for step in range(STEPS):
        group["lr"] = group["lr"] * 0.9
        param.grad = torch.randn(NUMEL) * 10.0 ** (step % 5 - 2)
        rule = recognise(optimizer, group)
        scalars = rule.scalars(group, state)
        states = rule.states(state, shard, torch.float32)
        before = shard.clone()
        kernel.update(rule, scalars, Operands(shard, param.grad, states=states))
        travelled += (shard - before).abs()
        group["foreach"] = False
        optimizer.step()
        group["foreach"] = None
    expected = optimizer.state[param]
    assert state.keys() == {key for key, value in expected.items() if value is not None}
    # each step rounds the parameter once, and may round each of the update's few operations the other way
    slack = STEPS * EPS * (param.abs() + 4 * travelled)
    assert (shard - param).abs().sub(slack).max() <= 0
    if exact:
        assert torch.equal(shard, param)
    for key, value in state.items():
        if exact or key == "step" or not group["weight_decay"] or group.get("decoupled_weight_decay"):
            assert torch.equal(value, expected[key])  # the parameter is not in it, or is the same
        else:
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


class Mine(AdamW):
    pass


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (AdamW, True),
        (lambda params: AdamW(params, fused=True), True),
        (lambda params: AdamW(params, lr=torch.tensor(0.1)), True),
        (lambda params: AdamW(params, foreach=True), False),
        (lambda params: SGD(params, foreach=False), False),
        (lambda params: Adam(params, differentiable=True), False),
        (Mine, False),
        (torch.optim.RMSprop, False),
        (torch.optim.SparseAdam, False),
        (Lion, True),
    ],
)
def test_recognise(make: Callable[..., Optimizer], found: bool) -> None:
    optimizer = make([nn.Parameter(torch.zeros(3))])
    assert (recognise(optimizer, optimizer.param_groups[0]) is not None) is found


@pytest.mark.parametrize(
    "changed",
    [
        {"betas": (torch.tensor(0.9), 0.99)},
        {"lr": torch.tensor(0.1, device="meta")},
        {"lr": torch.tensor(0.1, requires_grad=True)},
        {"capturable": True},
    ],
)
def test_what_only_the_device_or_autograd_knows_is_not_recognised(changed: dict[str, Any]) -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(3))])
    group = optimizer.param_groups[0]
    assert recognise(optimizer, group)
    assert recognise(optimizer, {**group, **changed}) is None


# Lion


def lion_by_hand(x: Tensor, m: Tensor, g: Tensor, lr: float, decay: float) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of the paper, but that the decay comes first, as in the optimizer."""
    c = 0.9 * m + 0.1 * g
    return x * (1 - lr * decay) - lr * torch.sign(c), 0.99 * m + 0.01 * g


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lion_by_hand(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(7, 5, dtype=dtype))
    optimizer = Lion([param], lr=1e-2, weight_decay=0.1)
    value, momentum = param.detach().double().clone(), torch.zeros(7, 5, dtype=torch.float64)
    for _ in range(STEPS):
        grad = torch.randn(7, 5, dtype=dtype)
        param.grad = grad.clone()
        optimizer.step()
        value, momentum = lion_by_hand(value, momentum, grad.double(), 1e-2, 0.1)
    slack = {"rtol": STEPS * torch.finfo(dtype).eps, "atol": STEPS * torch.finfo(dtype).eps}
    torch.testing.assert_close(optimizer.state[param]["exp_avg"].double(), momentum, **slack)
    torch.testing.assert_close(param.detach().double(), value, **slack)


def test_lion_is_an_optimizer() -> None:
    model = nn.Linear(3, 1)
    optimizer = Lion(model.parameters(), lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    other = Lion(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Lion(model.parameters(), **wrong)
    model.weight.grad = torch.eye(1, 3).to_sparse()
    with pytest.raises(RuntimeError, match="dense"):
        optimizer.step()


# Masters


def floats(bits: list[int]) -> Tensor:
    return torch.frombuffer(bytearray(struct.pack(f"<{len(bits)}I", *bits)), dtype=torch.float32)


#: Signs, exponents and mantissas of which each has its edges: zeros, subnormals, infinities, NaNs, ties.
EDGES = st.builds(
    lambda sign, exponent, mantissa: sign << 31 | exponent << 23 | mantissa,
    st.integers(0, 1),
    st.sampled_from([0, 1, 127, 254, 255]) | st.integers(0, 255),
    st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x18000, 0x7F8000, 0x7FFFFF])
    | st.integers(0, 0x7FFFFF),
)


@given(st.lists(EDGES, min_size=1, max_size=64))
@settings(max_examples=300, deadline=None)
def test_split_masters_come_back(bits: list[int]) -> None:
    master = floats(bits)
    high = round_to_compute(master, torch.empty(len(bits), dtype=torch.bfloat16))
    low = low_half(master, torch.empty(len(bits), dtype=torch.int16))
    back = join(high, low)
    numbers = ~master.isnan()
    assert torch.equal(back.isnan(), master.isnan())
    assert torch.equal(high.isnan(), master.isnan())
    assert torch.equal(back.view(torch.int32)[numbers], master.view(torch.int32)[numbers])
    out = torch.empty_like(master)
    assert join(high, low, out) is out
    assert torch.equal(out.view(torch.int32), back.view(torch.int32))


# The loss scale


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_loss_scale_is_the_grad_scalers(overflows: list[bool], interval: int) -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = SGD([param])
    scaler = torch.amp.GradScaler("cpu", growth_interval=interval)
    scaler.scale(torch.zeros(1))
    ours = LossScale(growth_interval=interval, minimum=2.0**-60)
    for overflow in overflows:
        param.grad = torch.tensor([float("inf") if overflow else 1.0])
        scaler.step(optimizer)
        scaler.update()
        ours.update(overflow)
    assert ours.state_dict() == scaler.state_dict()
    again = LossScale()
    again.load_state_dict(scaler.state_dict())
    assert again.state_dict() == {**ours.state_dict(), "scale": max(1.0, ours.value)}
    scaler.load_state_dict(ours.state_dict())


def test_loss_scale_has_bounds() -> None:
    scale = LossScale(initial_scale=4.0, growth_interval=1)
    for _ in range(3):
        scale.update(overflow=True)
    assert scale.value == 1.0
    assert scale.value == scale.minimum
    for _ in range(200):
        scale.update(overflow=False)
    assert scale.value == 2.0**127


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial_scale": 0.0},
        {"initial_scale": float("inf")},
        {"initial_scale": 0.5},
        {"growth_factor": 1.0},
        {"growth_factor": float("nan")},
        {"backoff_factor": 1.0},
        {"backoff_factor": 0.0},
        {"growth_interval": 0},
        {"minimum": 0.0},
    ],
)
def test_loss_scale_refuses_nonsense(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        LossScale(**wrong)


def test_loss_scale_loads_all_or_nothing() -> None:
    scale = LossScale()
    before = scale.state_dict()
    with pytest.raises(ValueError, match="backoff_factor"):
        scale.load_state_dict({**before, "scale": 8.0, "backoff_factor": 2.0})
    with pytest.raises(ValueError, match="lacks scale, growth_factor"):
        scale.load_state_dict({})
    assert scale.state_dict() == before
