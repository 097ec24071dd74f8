"""The kernels agree with each other, whatever the dtypes, cuts and threads; how the native one is built and kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gemini.optim.adagrad import Adagrad
from lightning_gemini.optim.adam import Adam
from lightning_gemini.optim.kernel import Kernel
from lightning_gemini.optim.lion import LionRule
from lightning_gemini.optim.masters import join, low_half, round_to_compute
from lightning_gemini.optim.native import NativeKernel, UnavailableError
from lightning_gemini.optim.operands import Operands
from lightning_gemini.optim.rounding import counter, noises, round_randomly
from lightning_gemini.optim.rule import Rule
from lightning_gemini.optim.sgd import Sgd
from lightning_gemini.optim.tensor_kernel import TensorKernel

FP32, BF16, FP16, INT16 = torch.float32, torch.bfloat16, torch.float16, torch.int16
CPU = torch.device("cpu")
RULES = [Adam(), Adam(amsgrad=True), Sgd(), Sgd(momentum=True), Adagrad(), LionRule()]
EXACT = [Sgd(), Sgd(momentum=True), LionRule()]  # no square root, which torch computes in its own way
VALUES = [(FP32, None), (BF16, None), (BF16, FP32), (BF16, INT16), (FP16, None), (FP16, FP32)]
NUMEL = 1003
GROUP = {
    "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True,
    "momentum": 0.9, "dampening": 0.0, "nesterov": True, "lr_decay": 0.0,
}  # fmt: skip

needs_fma = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch computes without fma here"
)


def native_kernel() -> Kernel:
    try:
        return NativeKernel()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["eager", "native"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return TensorKernel(compiled=False) if request.param == "eager" else native_kernel()


def start(value: tuple[torch.dtype, torch.dtype | None], n: int = NUMEL) -> dict[str, Any]:
    """A shard and its master, which start from the same numbers."""
    dtype, master = value
    weights = torch.randn(n, generator=torch.Generator().manual_seed(1))
    shard = round_to_compute(weights, torch.empty(n, dtype=dtype))
    if master is INT16:
        return {"shard": shard, "master": low_half(weights, torch.empty(n, dtype=INT16))}
    return {"shard": shard, "master": weights if master is not None else None}


def train(
    kernel: Kernel,
    rule: Rule,
    tensors: dict[str, Any],
    grad: torch.dtype = FP32,
    state_dtype: torch.dtype = FP32,
    steps: int = 4,
    cuts: Sequence[int] = (),
    **keywords: Any,
) -> list[Tensor]:
    """All tensors after some steps, made in as many runs of elements as ``cuts`` say."""
    state: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(2)
    shard = tensors["shard"]
    for step in range(steps):
        grads = torch.randn(shard.numel(), generator=generator).to(grad)
        scalars = rule.scalars(GROUP, state)
        states = rule.states(state, shard, state_dtype)
        whole = Operands(grad=grads, states=states, seed=step, **tensors, **keywords)
        for low, high in pairwise([0, *cuts, shard.numel()]):
            kernel.update(rule, scalars, whole.block(low, high))
    return [tensor for tensor in (shard, tensors["master"], *states) if tensor is not None]


def assert_same_bits(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        bits = torch.int32 if one.dtype == FP32 else INT16
        assert torch.equal(one.view(bits), other.view(bits))


# Agreement


@needs_fma
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_native_is_the_tensor_code(rule: Rule) -> None:
    kernel = native_kernel()
    for value in VALUES:
        for grad in (FP32, BF16, FP16):
            for state in (FP32, BF16):
                ours = train(kernel, rule, start(value), grad, state, factor=0.3, limit=0.5)
                theirs = train(TensorKernel(compiled=False), rule, start(value), grad, state, factor=0.3, limit=0.5)
                states = len(rule.state_names)
                assert_same_bits(ours[len(ours) - states :], theirs[len(theirs) - states :])
                if rule in EXACT:
                    assert_same_bits(ours, theirs)
                else:  # the update's last bits may move what is rounded by one place
                    for one, other in zip(ours[:1], theirs[:1], strict=True):
                        place = torch.finfo(one.dtype).eps
                        torch.testing.assert_close(one, other, rtol=2 * place, atol=4 * place)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_split_is_the_master(kernel: Kernel, rule: Rule) -> None:
    high, low, *states = train(kernel, rule, start((BF16, INT16)), BF16, steps=50)
    shard, master, *others = train(kernel, rule, start((BF16, FP32)), BF16, steps=50)
    assert_same_bits([high, join(high, low), *states], [shard, master, *others])


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_cuts_change_nothing(kernel: Kernel, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(kernel, Adam(amsgrad=True), start(value), BF16, BF16)
    assert_same_bits(train(kernel, Adam(amsgrad=True), start(value), BF16, BF16, cuts=(1, 2, 66, 1000)), whole)
    monkeypatch.setattr("lightning_gemini.optim.tensor_kernel._EAGER_BLOCK", 100)
    monkeypatch.setattr("lightning_gemini.optim.native._HALF_BLOCK", 100)
    assert_same_bits(train(kernel, Adam(amsgrad=True), start(value), BF16, BF16), whole)


def test_threads_change_nothing() -> None:
    kernel, n = native_kernel(), 3 * 2**17 + 5
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            tensors = train(kernel, Adam(), start((BF16, INT16), n), BF16, BF16, steps=2)
            results.append([*tensors, kernel.square_sum(tensors[-1]).view(1).float()])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_nothing_to_update(kernel: Kernel) -> None:
    empty = torch.empty(0)
    kernel.update(Sgd(), Sgd().scalars(GROUP, {}), Operands(empty, empty))
    assert kernel.square_sum(empty).item() == 0


# Gradients


@pytest.mark.parametrize("grad", [FP32, BF16, FP16])
def test_factor_and_limit_are_folded_in(kernel: Kernel, grad: torch.dtype) -> None:
    rule, grads = Adam(), torch.randn(NUMEL).to(grad)
    scalars = rule.scalars(GROUP, {})
    done = grads.float().mul(0.3).clamp(-0.2, 0.2)
    results = []
    for keywords in (
        {"grad": done},
        {"grad": grads, "factor": 0.3, "limit": 0.2},
        {"grad": grads, "factor": torch.tensor(0.3), "limit": 0.2},
    ):
        tensors = start((BF16, FP32))
        states = rule.states({}, tensors["shard"], FP32)
        kernel.update(rule, scalars, Operands(**tensors, states=states, **keywords))
        results.append([*tensors.values(), *states])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("state_dtype", [FP32, BF16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nan_stays_and_infinity_is_clamped(kernel: Kernel, rule: Rule, state_dtype: torch.dtype) -> None:
    grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0] * 20)
    for value in VALUES:
        tensors = start(value, len(grad))
        state: dict[str, Any] = {}
        scalars = rule.scalars(GROUP, state)
        states = rule.states(state, tensors["shard"], state_dtype)
        kernel.update(rule, scalars, Operands(grad=grad, states=states, limit=2.0, **tensors))
        for tensor in (tensors["shard"], *states):
            assert torch.equal(tensor.isnan(), grad.isnan())
            assert torch.equal(tensor.isfinite(), ~grad.isnan())


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_square_sum(kernel: Kernel, dtype: torch.dtype) -> None:
    values = torch.randn(300_001).to(dtype)
    expected = values.double().square().sum()
    found = kernel.square_sum(values)
    assert found.shape == ()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    values[7] = float("nan")
    assert kernel.square_sum(values).isnan()


def test_square_sum_beyond_fp32(kernel: Kernel) -> None:
    for dtype in (FP32, BF16):
        values = torch.tensor([1e30, -1e-30, 3e38], dtype=dtype)
        torch.testing.assert_close(kernel.square_sum(values), values.double().square().sum(), rtol=1e-12, atol=0)


# Stochastic rounding


def test_stochastic_rounding_is_right_on_average() -> None:
    n = 2**16
    for noise in noises(torch.arange(n, dtype=torch.int32) + counter(seed=3, first=0), 3):
        for part in (0.0, 0.25, 0.5, 0.9):
            value = 1 + part * 2**-7
            found = round_randomly(torch.full((n,), value), noise).double()
            assert set(found.tolist()) <= {1.0, 1 + 2**-7}
            deviation = (part * (1 - part) / n) ** 0.5
            assert abs((found.mean().item() - 1) * 2**7 - part) <= 4 * deviation


def test_stochastic_rounding_keeps_what_bf16_holds() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-130, float("inf"), -float("inf")])
    for noise in (0, 1, 0xFFFF, -1):
        found = round_randomly(values, torch.full((len(values),), noise, dtype=torch.int32))
        assert_same_bits([found], [values.bfloat16()])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, 0xFF800001 - 2**32, -1], dtype=torch.int32).view(FP32)
    assert round_randomly(nans, torch.full((4,), 0xFFFF, dtype=torch.int32)).isnan().all()


def test_seeds_and_places_give_other_noise() -> None:
    streams = [
        noises(torch.arange(1000, dtype=torch.int32) + counter(seed, first), 1)[0].bitwise_and(0xFFFF)
        for seed, first in ((0, 0), (1, 0), (2, 0), (0, 5), (-1, 0), (2**32 - 2, 0))
    ]
    for i, one in enumerate(streams):
        assert all((one == other).float().mean() < 0.01 for other in streams[:i])
    assert torch.equal(streams[3][:-5], streams[0][5:])


# Operands


def test_operands_refuse_what_no_kernel_takes() -> None:
    x, half = torch.zeros(4), torch.zeros(4, dtype=BF16)
    for wrong in (
        {"shard": x, "grad": torch.zeros(3)},
        {"shard": x, "grad": torch.zeros(8)[::2]},
        {"shard": torch.zeros(2, 2), "grad": torch.zeros(2, 2)},
        {"shard": x, "grad": torch.zeros(4, device="meta")},
        {"shard": x, "grad": x, "master": torch.zeros(4)},
        {"shard": x.half(), "grad": x, "master": torch.zeros(4, dtype=INT16)},
        {"shard": x.double(), "grad": x},
        {"shard": x, "grad": x.double()},
        {"shard": x, "grad": x, "states": (x, half)},
        {"shard": x, "grad": x, "states": (x.half(),)},
    ):
        with pytest.raises(ValueError, match=r"operands are|is on|cannot|must be"):
            Operands(**wrong)


def test_native_refuses_states_that_are_not_the_rules() -> None:
    x, rule = torch.zeros(4), Adam()
    with pytest.raises(ValueError, match="not 1 on cpu"):
        native_kernel().update(rule, rule.scalars(GROUP, {}), Operands(x, x, states=(x,)))


# Compilation by torch


def test_a_schedule_and_other_lengths_do_not_recompile() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    kernel = TensorKernel(compiled=True)
    rule, value = Adam(), (BF16, INT16)
    for n in (NUMEL, 12, 300_001):
        ours = train(kernel, rule, start(value, n), BF16, BF16, factor=0.3, limit=0.5)
        theirs = train(TensorKernel(compiled=False), rule, start(value, n), BF16, BF16, factor=0.3, limit=0.5)
        torch.testing.assert_close(join(ours[0], ours[1]), join(theirs[0], theirs[1]), rtol=1e-3, atol=1e-4)
        for one, other in zip(ours[2:], theirs[2:], strict=True):  # a last bit of fp32 may decide how bf16 is rounded
            torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-9)
            assert (one != other).float().mean() < 1e-3
    assert kernel.name == "compiled"
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_for_torch_it_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_triton(*_: Any) -> None:
        raise torch._dynamo.exc.TorchDynamoException("Triton is missing\nand so on")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_triton)
    kernel = TensorKernel(compiled=True)
    with pytest.warns(UserWarning, match="needs Triton and a C compiler: Triton is missing$") as caught:
        ours = train(kernel, LionRule(), start((BF16, FP32)))
    assert len(caught) == 1
    assert kernel.name == "eager"
    assert_same_bits(ours, train(TensorKernel(compiled=False), LionRule(), start((BF16, FP32))))
