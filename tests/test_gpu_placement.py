"""Planned movement on a GPU: equal to everything kept, within its memory, refused where that is not possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gemini.core import Engine, OutOfBudgetError, shard

pytestmark = pytest.mark.gpu

WIDTH, DEPTH, STEPS = 1024, 12, 6
MIB = 2**20


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))


def _train(rows: int = 8, steps: int = STEPS, **options: Any) -> tuple[list[float], dict[str, Tensor], Engine, int]:
    """Losses, weights, the engine, and the most that torch had given out in the last step."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = shard(model, [optimizer], device="cuda", **options)
    batch = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()
    losses = []
    for _ in range(steps):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated()
    with engine.summon():
        weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return losses, weights, engine, peak


@pytest.mark.parametrize("megabytes", [160, 110])
def test_a_plan_trains_to_the_same_numbers_within_its_budget(megabytes: int) -> None:
    expected_losses, expected, kept, _ = _train(placement="device")
    kept.release()
    before = torch.cuda.memory_allocated()
    losses, weights, engine, peak = _train(placement="auto", device_memory=megabytes * MIB)
    assert engine.counters.followed == STEPS - 2  # the second one is recorded, too, for its times
    assert engine.counters.fetched_bytes > 0
    assert engine.store.device.peak <= megabytes * MIB
    assert peak - before <= megabytes * MIB
    assert engine.store.slabs.pinned_bytes == engine.store.slabs.reserved_bytes > 0
    # homes on the host are updated there, by another kernel
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    engine.release()


def test_host_placement_keeps_the_device_nearly_empty() -> None:
    _, _, engine, _ = _train(placement="host")
    chunk = max(spec.nbytes for spec in engine.layout.chunks)
    assert engine.store.device.peak <= 8 * chunk
    engine.release()


def test_activations_are_measured_and_refused_before_the_update() -> None:
    model = _model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = shard(model, [optimizer], device="cuda", placement="auto", device_memory=100 * MIB)
    with pytest.raises(OutOfBudgetError, match="a smaller batch"):
        model(torch.randn(2**13, WIDTH, device="cuda")).square().mean().backward()  # 32 MiB of activations a layer
    with engine.summon():
        assert all(torch.equal(p.cpu(), value) for p, value in zip(model.parameters(), before, strict=True))
    engine.release()


def test_a_step_that_grows_is_recorded_again() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = shard(model, [optimizer], device="cuda", placement="auto", device_memory=200 * MIB)
    others = []
    for rows in (8, 8, 512, 512, 512):
        model(torch.randn(rows, WIDTH, device="cuda")).square().mean().backward()
        optimizer.step()
        (known,) = engine._schedule.playbook.known
        others.append(max(moment.other for moment in known.trace.moments))
    assert others[-1] >= others[0]
    assert engine.store.device.peak <= 200 * MIB
    engine.release()
