"""Steps that are not the same every time: they settle where they can, and need no more memory than others."""

from __future__ import annotations

import random
import re
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gemini.core import Engine, shard
from tests.outcomes import group
from tests.ranks import run_ranks

CHUNK = 1088 * 4


class Layers(nn.Module):
    """Linear layers, some of which may be skipped."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(count))

    def forward(self, x: Tensor, skipped: frozenset[int] = frozenset()) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number not in skipped:
                x = layer(x).tanh()
        return x


def make(count: int = 13, **options: Any) -> tuple[Layers, torch.optim.Optimizer, Engine]:
    torch.manual_seed(0)
    model = Layers(count)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    reduce_group = dist.new_group() if dist.is_initialized() else None
    return model, optimizer, shard(model, [optimizer], group=group(), reduce_group=reduce_group, **options)


def test_accumulation_by_hand_settles() -> None:
    model, optimizer, engine = make(chunk_size=1088, device_memory=40 * CHUNK)
    for number in range(16):
        with engine.forward("training_step"):
            model(torch.ones(2, 32)).square().mean().backward()
            if number % 2:
                optimizer.step()
    assert engine.counters.strayed == 1  # the second one, which was the first with an update
    assert engine.counters.followed == 14


def test_a_layer_that_is_never_used_keeps_no_other_gradient_waiting() -> None:
    model, optimizer, engine = make(chunk_size=1088, placement="host", device_memory=5 * CHUNK)
    for _ in range(4):
        model(torch.ones(2, 32), frozenset({12})).square().mean().backward()
        optimizer.step()
    assert engine.store.device.peak <= 5 * CHUNK


def test_a_new_form_of_a_step_is_planned_for_alone() -> None:
    model, optimizer, engine = make(chunk_size=1088, device_memory=40 * CHUNK)
    planned = []
    plan = engine._placement._plan
    engine._placement._plan = lambda traces, homes: planned.append(len(traces)) or plan(traces, homes)  # type: ignore
    for number in range(8):
        model(torch.ones(2, 32), frozenset({number})).square().mean().backward()
        optimizer.step()
    assert set(planned) == {1}


def _drop_layers(device_memory: int | None) -> tuple[list[float], int]:
    model, optimizer, engine = make(chunk_size=1088 * 2, device_memory=device_memory)
    generator = random.Random(0)
    losses = []
    for _ in range(12):
        skipped = frozenset(generator.sample(range(13), 3))
        loss = model(torch.full((2, 32), 1.0 + dist.get_rank()), skipped).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    peak = engine.store.device.peak
    engine.release()
    return losses, peak


def _drop_layers_with_less() -> tuple[list[float], list[float]]:
    expected, need = _drop_layers(None)
    bound = need * 45 // 100
    losses, peak = _drop_layers(bound)
    assert peak <= bound
    return expected, losses


def test_layers_that_are_dropped_at_random_on_two_ranks() -> None:
    for expected, losses in run_ranks(_drop_layers_with_less, 2):
        torch.testing.assert_close(losses, expected)


def test_a_step_under_reentrant_checkpoints_is_one_with_gradients() -> None:
    model, optimizer, engine = make(4, chunk_size=1088, placement="host", device_memory=16 * CHUNK)
    for number in range(6):
        with engine.accumulate() if number % 3 < 2 else nullcontext():
            with engine.forward("training_step"):
                x = torch.ones(2, 32, requires_grad=True)
                loss = checkpoint(model, x, use_reentrant=True).square().mean()
            with engine.backward():
                loss.backward()
        if number % 3 == 2:
            optimizer.step()
    with torch.no_grad(), engine.forward("training_step"):
        model(torch.ones(2, 32))
    kinds = re.findall("^(training_step.*): fetches", engine.memory_report(), re.MULTILINE)
    assert sorted(kinds) == ["training_step", "training_step without gradients", "training_step, accumulating"]
