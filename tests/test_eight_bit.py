"""bitsandbytes' 8-bit states on chunks are those of the unsharded run, to the bit; pytorch_optimizer's optimizers."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gemini.core import ConfigurationError, DtypePolicy, Home, shard
from lightning_gemini.core.blocks import BLOCK
from lightning_gemini.core.trial import try_on_pieces
from tests.ranks import run_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes")

Make = Callable[[Any], Optimizer]

EIGHT_BIT: dict[str, Make] = {
    "AdamW8bit": lambda p: bnb.optim.AdamW8bit(p, lr=0.01, weight_decay=0.1),
    "Adam8bit": lambda p: bnb.optim.Adam8bit(p, lr=0.01),
    "PagedAdamW8bit": lambda p: bnb.optim.PagedAdamW8bit(p, lr=0.01),
    "Lion8bit": lambda p: bnb.optim.Lion8bit(p, lr=0.001, weight_decay=0.1),
    "AdEMAMix8bit": lambda p: bnb.optim.AdEMAMix8bit(p, lr=0.01, t_alpha=3, t_beta3=3),
    "SGD8bit": lambda p: bnb.optim.SGD8bit(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "RMSprop8bit": lambda p: bnb.optim.RMSprop8bit(p, lr=0.001),
    "Adagrad8bit": lambda p: bnb.optim.Adagrad8bit(p, lr=0.01),
    "AdamW with 8 bits for all": lambda p: bnb.optim.AdamW(p, lr=0.01, optim_bits=8, min_8bit_size=1),
    "AdamW with 32 bits": lambda p: bnb.optim.AdamW(p, lr=0.01),
}
SIZES = [(70, 61), (61,), (1,), (300, 20), (), (BLOCK,), (33, 130), (5000,)]


class Model(nn.Module):
    """Parameters above and below 4096 elements, whose ends are not those of blocks; one has no gradient at times."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES])

    def forward(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        loss = torch.zeros(())
        for number, weight in enumerate(self.weights):
            noise = torch.randn(weight.shape, generator=generator)
            if number != 3 or step % 3 == 0:
                loss = loss + (number + 1) * (weight * noise).sum() + weight.square().sum()
        return loss


def run(
    make: Make,
    steps: range,
    home: Home | None = None,
    model: nn.Module | None = None,
    state: Any = None,
    policy: DtypePolicy | None = None,
) -> tuple[list[Tensor], Any, Any]:
    """Plain where ``home`` is None. Returns the weights, the optimizer's state, and its bytes as counted."""
    model = copy.deepcopy(model) if model is not None else Model()
    optimizer = make(model.parameters())
    group = dist.group.WORLD if dist.is_initialized() else None
    engine = None
    if home:
        engine = shard(model, [optimizer], home=home, chunk_size=8192, group=group, policy=policy or DtypePolicy())
    if state is not None:
        optimizer.load_state_dict(state)
    used = []
    for step in steps:
        model(step).backward()
        used.append(engine.store.host.used if engine else 0)  # with all gradients
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    if engine:
        engine.release()
    return [param.detach().clone() for param in model.parameters()], saved, used[-1] - used[0]


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("make", EIGHT_BIT.values(), ids=EIGHT_BIT)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_states_in_blocks_are_bit_exact_and_go_on(make: Make) -> None:
    expected, plain, _ = run(make, range(4))
    for home in (Home.FULL, Home.HOST):
        weights, saved, _ = run(make, range(4), home)
        assert_same(weights, expected)
        assert_same(saved, plain)
    # from a file, by parameter: on chunks, and plain
    file = io.BytesIO()
    torch.save(saved, file)
    model = Model()
    for param, value in zip(model.parameters(), expected, strict=True):
        param.data.copy_(value)
    expected, plain, _ = run(make, range(4, 8), model=model, state=plain)
    for home in (None, Home.DEVICE):
        file.seek(0)
        weights, again, _ = run(make, range(4, 8), home, model, torch.load(file, weights_only=True))
        assert_same(weights, expected)
        assert_same(again, plain)


def _on_ranks(name: str, steps: range, model: Any, state: Any) -> tuple[Any, Any]:
    weights, saved, _ = run(EIGHT_BIT[name], steps, Home.DEVICE, model, state)
    return weights, saved


def test_two_ranks_cut_between_blocks() -> None:
    for name in ("AdamW8bit", "AdEMAMix8bit"):
        expected, plain, _ = run(EIGHT_BIT[name], range(4))
        (weights, saved), (_, other) = run_ranks(_on_ranks, 2, name, range(4), None, None)
        assert_same(weights, expected)
        assert_same(saved, plain)
        assert not other["state"]
        # and back, from what one process has
        model = Model()
        for param, value in zip(model.parameters(), expected, strict=True):
            param.data.copy_(value)
        state = copy.deepcopy(plain)
        expected, plain, _ = run(EIGHT_BIT[name], range(4, 7), model=model, state=plain)
        (weights, saved), _ = run_ranks(_on_ranks, 2, name, range(4, 7), model, state)
        assert_same(weights, expected)
        assert_same(saved, plain)


def test_bytes_are_counted() -> None:
    _, _, used = run(EIGHT_BIT["AdamW8bit"], range(2), Home.HOST, nn_linear())
    codes, scales, code_books = 2 * 2**20, 2 * 4 * 2**20 // BLOCK, 2 * 1024
    assert used == codes + scales + code_books


def nn_linear() -> nn.Module:
    class Steps(nn.Linear):
        def forward(self, step: int) -> Tensor:
            return self.weight.sum() * (step + 1)

    return Steps(1024, 1024, bias=False)


def test_parameters_start_at_blocks_only_where_states_have_some() -> None:
    for make, alignment in ((bnb.optim.AdamW8bit, BLOCK), (torch.optim.AdamW, 64)):
        model = Model()
        engine = shard(model, [make(model.parameters(), lr=0.01)])
        assert engine.layout.alignment == alignment
        assert all(slot.offset % alignment == 0 for chunk in engine.layout.chunks for slot in chunk.slots)


def test_the_trial_sees_cuts_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = bnb.optim.AdamW8bit([nn.Parameter(torch.ones(8))], lr=0.01)
    trial = (optimizer, optimizer.param_groups[0], torch.device("cpu"), 8)
    assert try_on_pieces(*trial).problem is None
    monkeypatch.setattr("lightning_gemini.core.trial._CUT_IN_BLOCKS", 3 * BLOCK + 64)
    assert "not the update of the same numbers" in (try_on_pieces(*trial).problem or "")


@pytest.mark.parametrize("name", ["LAMB", "LAMB8bit", "LARS", "LARS8bit"])
def test_scaling_by_norm_is_refused(name: str) -> None:
    model = nn.Linear(8, 8)
    more = {"lr": 0.1, "momentum": 0.9} if "LARS" in name else {}
    with pytest.raises(ConfigurationError, match=rf"{name}\) cannot update flat shards: it scales the update of each"):
        shard(model, [getattr(bnb.optim, name)(model.parameters(), **more)])


def test_strided_parameters_are_refused() -> None:
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    with pytest.raises(ConfigurationError, match=r"optimizer 0 \(AdamW8bit\) keeps states for blocks of 256 elements"):
        shard(model, [bnb.optim.AdamW8bit(model.parameters())])


def _overridden(model: Model, **settings: Any) -> tuple[Any, Optimizer]:
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.override_config(model.weights[0], key_value_dict=settings)
    return manager, bnb.optim.AdamW8bit(model.parameters(), lr=0.01)


def test_overrides_of_bits_hold_and_others_are_refused() -> None:
    results = []
    for home in (None, Home.HOST):
        model = Model()
        manager, optimizer = _overridden(model, optim_bits=32)
        try:
            engine = shard(model, [optimizer], home=home, chunk_size=8192) if home else None
            model(0).backward()
            optimizer.step()
            results.append(optimizer.state_dict()["state"])
            if engine:
                engine.release()
        finally:
            manager.initialize()
    assert results[1][0]["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.float32
    assert_same(results[1], results[0])
    model = Model()
    manager, optimizer = _overridden(model, lr=0.5)
    try:
        with pytest.raises(ConfigurationError, match="overrides lr for a parameter of shape"):
            shard(model, [optimizer])
        assert model.weights[0].isfinite().all()
        assert model.weights[0].shape == SIZES[0]
    finally:
        manager.initialize()


def test_split_masters_give_the_same_as_copies() -> None:
    policies = [DtypePolicy(torch.bfloat16, master=kind, reduce=torch.float32) for kind in ("split", "fp32")]
    results = [run(EIGHT_BIT["AdamW8bit"], range(5), Home.HOST, policy=policy)[:2] for policy in policies]
    assert_same(results[0], results[1])
    expected, _, _ = run(EIGHT_BIT["AdamW8bit"], range(5))
    for value, other in zip(results[0][0], expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, other, rtol=0.02, atol=0.06)  # gradients are of rounded weights


def test_bf16_parameters_without_masters() -> None:
    def make(params: Any) -> Optimizer:
        return bnb.optim.AdamW8bit(params, lr=0.01)

    model = Model().to(torch.bfloat16)
    expected, plain, _ = run(make, range(3), model=model)
    weights, saved, _ = run(make, range(3), Home.HOST, model)
    assert_same(weights, expected)
    assert_same(saved, plain)
    for param, value in zip(model.parameters(), expected, strict=True):
        param.data.copy_(value)
    # fp32 states of small parameters stay so; bitsandbytes updates nothing where they are of another dtype
    weights, _, _ = run(make, range(3, 5), Home.HOST, model, copy.deepcopy(plain))
    expected, _, _ = run(make, range(3, 5), None, model, plain)
    assert_same(weights, expected)


# pytorch_optimizer

ELEMENTWISE = [
    "ADOPT", "AdEMAMix", "AdaBelief", "Adan", "Grams", "LaProp", "Lion", "ScheduleFreeAdamW",
    "ScheduleFreeSGD", "SimplifiedAdEMAMix", "Tiger", "Yogi",
]  # fmt: skip


def optimizers() -> Any:
    return pytest.importorskip("pytorch_optimizer")


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_flat_segments_are_bit_exact(name: str) -> None:
    def make(params: Any) -> Optimizer:
        return getattr(optimizers(), name)(params, lr=0.01)

    expected, plain, _ = run(make, range(4))
    weights, saved, _ = run(make, range(4), Home.HOST)
    assert_same(weights, expected)
    assert_same(saved, plain)
    model = Model()
    for param, value in zip(model.parameters(), expected, strict=True):
        param.data.copy_(value)
    expected, plain, _ = run(make, range(4, 7), model=model, state=plain)
    weights, saved, _ = run(make, range(4, 7), Home.HOST, model, saved)
    assert_same(weights, expected)
    assert_same(saved, plain)


REFUSED = {
    "AdaFactor": "factors the second moment",
    "AdaNorm": "not the update of the same numbers",
    "AdaShift": "state 'grad_queue', a deque, holds more than numbers",
    "AdamP": "not the update of the same numbers",
    "AggMo": "state 'momentum_buffer', a dict, holds more than numbers",
    "DAdaptAdam": "its '\\w+' of a matrix is not that of",
    "EmoNavi": "it keeps 'ema' for all parameters together",
    "FlashAdamW": "belongs to no element of a flat parameter",
    "LARS": "scales the update of each parameter by that parameter's norm",
    "Lamb": "scales the update of each parameter by that parameter's norm",
    "MADGRAD": "it keeps 'k' for all parameters together",
    "Muon": "orthogonalises whole matrices",
    "Prodigy": "finds one learning rate from all parameters together",
    "SOAP": "preconditions with statistics of whole matrices",
    "SWATS": "its state 'exp_avg2' of a matrix is not that of",
    "ScalableShampoo": "preconditions with statistics of whole matrices",
    "Shampoo": "preconditions with statistics of whole matrices",
    "StableAdamW": "not the update of the same numbers",
}


@pytest.mark.parametrize("name", REFUSED)
def test_whole_tensor_optimizers_are_refused(name: str) -> None:
    model = nn.Linear(8, 8, bias=False)
    groups: Any = [{"params": list(model.parameters()), "use_muon": True}] if name == "Muon" else model.parameters()
    with pytest.raises(ConfigurationError, match=rf"{name}\) cannot update flat shards: .*{REFUSED[name]}"):
        shard(model, [getattr(optimizers(), name)(groups, lr=0.01)])


def test_schedule_free_modes_are_refused_and_come_back() -> None:
    model = nn.Linear(8, 8)
    optimizer = optimizers().ScheduleFreeAdamW(model.parameters(), lr=0.01)
    engine = shard(model, [optimizer])
    with pytest.raises(
        ConfigurationError, match=r"ScheduleFreeAdamW.eval\(\) would exchange weights outside of a step"
    ):
        optimizer.eval()
    engine.release()
    optimizer.eval()
    assert not optimizer.param_groups[0]["train_mode"]
