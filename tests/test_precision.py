"""bf16: masters keep what bf16 would lose, and values are those of a hand-written reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gemini.core import DtypePolicy, Home, shard
from lightning_gemini.optim.masters import round_to_compute
from tests import cases

MIXED = DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32)
TRUE = DtypePolicy(torch.bfloat16)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_rounding_is_to_nearest_with_ties_away(bits: list[int]) -> None:
    signed = torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32)
    master = signed.view(torch.float32)
    rounded = round_to_compute(master, torch.empty(len(bits), dtype=torch.bfloat16))
    for value, result in zip(master.double(), rounded, strict=True):
        if value.isnan():
            assert result.isnan()
            continue
        low = int(value.float().view(torch.int32)) & 0xFFFF
        nearest = value.to(torch.bfloat16)  # ties to even
        if low != 0x8000:
            assert result == nearest
        else:
            assert result.double().abs() >= nearest.double().abs()


@pytest.mark.parametrize("home", list(Home))
def test_mixed_is_adamw_on_masters(home: Home) -> None:
    model = cases.build("Mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    engine = shard(model, [optimizer], home=home, chunk_size=2048, policy=MIXED)
    reference = cases.build("Mlp")
    masters = [nn.Parameter(p.detach().clone()) for p in reference.parameters()]
    expected = torch.optim.AdamW(masters, lr=0.01, foreach=False)
    for index in range(6):
        x = cases.floats(torch.Generator().manual_seed(index)).bfloat16()
        for param, master in zip(reference.parameters(), masters, strict=True):
            param.data = round_to_compute(master.detach(), torch.empty(master.shape, dtype=torch.bfloat16))
            param.grad = None
        ours, theirs = model(x).float().square().mean(), reference(x).float().square().mean()
        assert torch.equal(ours, theirs)
        for loss in (ours, theirs):
            loss.backward()
        for param, master in zip(reference.parameters(), masters, strict=True):
            master.grad = param.grad.float()
        for each in (optimizer, expected):
            each.step()
        optimizer.zero_grad()
    engine.release()
    for value, master in zip(model.parameters(), masters, strict=True):
        assert value.dtype == torch.float32, "after the run the model has its own dtype again"
        assert torch.equal(value, master)


@pytest.mark.parametrize("policy", [MIXED, TRUE], ids=["mixed", "true"])
@pytest.mark.parametrize("name", ["opt", "llama_checkpoint", "bert", "ConvNet"])
def test_models_train_in_bf16(name: str, policy: DtypePolicy) -> None:
    if name == "ConvNet" and not policy.master:
        pytest.skip("without masters the buffers are cast too, by the precision plugin")
    model = cases.build(name)
    optimizer = cases.adamw(name, model)
    engine = shard(model, [optimizer], home=Home.DEVICE, chunk_size=4096, policy=policy)
    batch = cases.batches(name, 1, 1)[0][0]
    batch = batch.bfloat16() if batch.is_floating_point() else batch
    losses = []
    for _ in range(12):
        loss = cases.CASES[name].loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9
    engine.release()


def _moved(policy: DtypePolicy) -> float:
    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    engine = shard(model, [optimizer], policy=policy)
    x = torch.randn(16, 32).bfloat16()
    for _ in range(30):
        F.mse_loss(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.release()
    # from where bf16 starts, not from the fp32 values
    start = before if policy.master else before.bfloat16().float()
    return ((model.weight.detach() - start).abs() > 1e-4).float().mean().item()


def test_small_steps_are_not_lost_in_masters() -> None:
    assert _moved(MIXED) > 0.9
    assert _moved(TRUE) < 0.5


@pytest.mark.parametrize(("master", "expected"), [("split", 14), ("fp32", 16)])
@pytest.mark.parametrize("rule", [True, False])
def test_bytes_per_parameter_are_as_designed(master: Any, expected: int, rule: bool) -> None:
    """With a gradient that waits for the step, as clipping needs; 2 more while accumulating."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=None if rule else False)
    policy = DtypePolicy(torch.bfloat16, master=master, reduce=torch.float32)
    engine = shard(model, [optimizer], policy=policy, home=Home.FULL)
    device, numel = engine.store.device, engine.layout.nbytes // 2
    chunk = max(spec.nbytes for spec in engine.layout.chunks)
    x = torch.randn(4, 64).bfloat16()
    for without_state in (8, 0):
        model(x).sum().backward()
        engine.clip_grad_norm(optimizer, 1e-3)
        # but for the padding, of which there is no state
        assert device.used == pytest.approx((expected - without_state) * numel, rel=1e-3)
        optimizer.step()
    assert f"{expected} bytes per trained parameter: 2 parameter, {expected - 12} master" in engine.memory_report()
    # what only an update needs: nothing for a rule, an fp32 gradient and joined values for one chunk otherwise
    assert device.peak - expected * numel <= (0 if rule else 4 * chunk)
    with engine.accumulate():
        model(x).sum().backward()
    assert device.used - (expected + 2) * numel <= chunk


def test_frozen_and_evaluated_weights_keep_their_bits() -> None:
    """What is only read goes through bf16, but comes back as it was."""
    for optimizers in (lambda m: [], lambda m: [torch.optim.AdamW(m.parameters())]):
        model = cases.build("FrozenBackbone")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine = shard(model, optimizers(model), policy=MIXED, home=Home.DEVICE)
        model(torch.randn(2, 32).bfloat16())
        engine.release()
        for name, param in model.named_parameters():
            assert torch.equal(param, before[name]), name


@pytest.mark.parametrize("home", list(Home))
@pytest.mark.parametrize("built", [torch.float32, torch.bfloat16])
def test_what_is_unfrozen_later_gets_its_master_then(built: torch.dtype, home: Home) -> None:
    """Equal to a model whose parameters were trainable when their masters were made."""
    results = []
    for frozen_at_layout in (True, False):
        model = cases.build("FrozenBackbone").to(built)
        model.backbone.requires_grad_(not frozen_at_layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        policy = DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32)
        engine = shard(model, [optimizer], home=home, chunk_size=2048, policy=policy)
        model.backbone.requires_grad_(False)
        before = len(engine.store.masters)
        for step in range(6):
            if step == 3:
                model.backbone.requires_grad_(True)
            batch = cases.batches("FrozenBackbone", 6, 1)[step][0].bfloat16()
            cases.CASES["FrozenBackbone"].loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(engine.store.masters) == len(engine.layout.chunks)
        assert before < len(engine.layout.chunks) or not (frozen_at_layout and built == torch.bfloat16)
        with engine.summon():
            results.append([p.detach().clone() for p in model.parameters()])
        engine.release()
        assert engine.store.device.used == engine.store.host.used == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
