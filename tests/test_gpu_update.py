"""Updates on a GPU: nothing leaks, the background changes no numbers, out of memory is an event, sanitizers are silent.

Collected everywhere, run where there is a GPU.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import sanitizer
from lightning_gemini.core import DtypePolicy, Engine, shard
from lightning_gemini.core.update_policy import UpdatePolicy

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
WIDTH, DEPTH, ROWS = 1024, 12, 8
LEARNING_RATE = 1e-4  # small: where a gradient is all rounding, Adam takes a whole step in some direction
MIB = 2**20


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)))


def _batch(number: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(number)).to(DEVICE)


def _engine(model: nn.Module, overlap: bool, **options: Any) -> tuple[Engine, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    update = UpdatePolicy(overlap=overlap)
    return shard(model, [optimizer], device=DEVICE, update=update, **options), optimizer


def _weights(engine: Engine) -> dict[str, Tensor]:
    with engine.summon(exact=True):
        return {name: p.detach().cpu().clone() for name, p in engine.model.named_parameters()}


def _settled() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "options", [{"placement": "host"}, {"placement": "auto", "device_memory": 120 * MIB}], ids=["host", "auto"]
)
def test_fifty_steps_leave_no_byte_behind(options: dict[str, Any], overlap: bool) -> None:
    model = _model()
    engine, optimizer = _engine(model, overlap=overlap, **options)
    seen = {}
    for step in range(1, 51):
        model(_batch(step)).square().mean().backward()
        engine.clip_grad_norm(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in (10, 50):
            with engine.summon():  # what went on in the background is over, and nothing is on its way
                slabs = engine.store.slabs
                # torch's own pinned memory, beside the slabs
                torchs = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
                used = engine.store.device.used, engine.store.host.used
                seen[step] = _settled(), slabs.pinned_bytes, slabs.reserved_bytes, torchs, used
    assert seen[10] == seen[50]
    engine.release()


def _train(
    accumulation: int, clip: float | None, options: dict[str, Any] | None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of the engine, or of plain PyTorch where there are no options."""
    model = _model()
    engine = None
    if options is None:
        model.to(DEVICE)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    else:
        engine, optimizer = _engine(model, **options)
    losses = []
    for step in range(8):
        for micro in range(accumulation):
            last = micro == accumulation - 1
            with nullcontext() if engine is None or last else engine.accumulate():
                loss = model(_batch(step * accumulation + micro)).square().mean() / accumulation
                loss.backward()
            losses.append(loss.item())
        if clip is not None:
            if engine is None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            else:
                engine.clip_grad_norm(optimizer, clip)
        optimizer.step()
        optimizer.zero_grad()
    if engine is None:
        return losses, {name: p.detach().cpu() for name, p in model.named_parameters()}
    weights = _weights(engine)
    engine.release()
    return losses, weights


@pytest.mark.parametrize("clip", [None, 0.01], ids=["free", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "options", [{"placement": "host"}, {"placement": "auto", "device_memory": 120 * MIB}], ids=["host", "auto"]
)
def test_the_background_changes_no_numbers(options: dict[str, Any], accumulation: int, clip: float | None) -> None:
    expected_losses, expected = _train(accumulation, clip, None)
    losses, weights = _train(accumulation, clip, {"overlap": True, **options})
    waiting_losses, waiting = _train(accumulation, clip, {"overlap": False, **options})
    assert losses == waiting_losses
    assert all(torch.equal(weights[name], waiting[name]) for name in expected), "the same bits as without"
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=2e-3, atol=5e-4)


class _Hungry(nn.Module):
    """Asks for more memory than there is, once the batch is a large one, behind half of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _model()[: DEPTH // 2], _model()[DEPTH // 2 :]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if len(x) > ROWS:
            total = torch.cuda.get_device_properties(x.device).total_memory
            x = x + torch.empty(2 * total, dtype=torch.uint8, device=x.device)[:1]
        return self.second(x)


@pytest.mark.parametrize(
    "options", [{"placement": "host"}, {"placement": "auto", "device_memory": 120 * MIB}], ids=["host", "auto"]
)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_model_that_runs_out_of_memory_trains_on_with_less(options: dict[str, Any], overlap: bool) -> None:
    torch.manual_seed(0)
    model = _Hungry()
    policy = DtypePolicy(torch.bfloat16, master="split")
    engine, optimizer = _engine(model, overlap=overlap, policy=policy, **options)

    def step(rows: int) -> float:
        loss = (model(_batch(1, rows).bfloat16()).float() - 0.5).square().mean()
        loss.backward()
        engine.clip_grad_norm(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step(ROWS) for _ in range(3)]
    weights, states = _weights(engine), engine.optimizer_state_dict(optimizer)["state"]
    allocated = _settled()
    for _ in range(3):
        with pytest.raises((MemoryError, RuntimeError), match=r"(?i)memory"):
            step(2 * ROWS)
        optimizer.zero_grad()
    after, states_after = _weights(engine), engine.optimizer_state_dict(optimizer)["state"]
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    for index, state in states.items():
        assert all(torch.equal(states_after[index][key], value) for key, value in state.items())
    assert _settled() <= allocated + MIB, "nothing of the failed steps is left"
    losses += [step(ROWS) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    engine.release()


@pytest.mark.skipif(sanitizer.find() is None, reason="compute-sanitizer is not installed")
@pytest.mark.timeout(900)
def test_sanitizers_find_nothing_in_copies() -> None:
    for found in sanitizer.check(lambda: 280.0, has_gpu=True):
        assert found["outcome"] == "clean", f"{found['tool']}: {found['outcome']}\n{found['output']}"
