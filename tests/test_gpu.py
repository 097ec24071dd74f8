"""The same engine on a GPU: equal to plain PyTorch there, and nothing left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._pytree import tree_map_only

from lightning_gemini import GeminiStrategy
from lightning_gemini.core import Home, shard
from tests import cases
from tests.lightning_cases import Module, loader, trainer

pytestmark = pytest.mark.gpu

STEPS = 3


def _train(name: str, home: Home | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = cases.build(name)
    if home is None:
        model.cuda()
    optimizer = cases.adamw(name, model)
    engine = None
    if home is not None:
        engine = shard(model, [optimizer], device="cuda", home=home, chunk_size=2048, **cases.CASES[name].options)
    losses = []
    for step in cases.batches(name, STEPS, 1):
        loss = cases.CASES[name].loss(model, tree_map_only(torch.Tensor, torch.Tensor.cuda, step[0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if engine is not None:
        engine.release()
    return losses, {key: value.detach().cpu() for key, value in model.named_parameters()}


@pytest.mark.parametrize("home", list(Home), ids=lambda home: home.value)
@pytest.mark.parametrize("name", ["Mlp", "ConvNet", "opt", "llama", "t5", "lstm"])
def test_equal_to_plain(name: str, home: Home) -> None:
    expected_losses, expected = _train(name, None)
    losses, params = _train(name, home)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=1e-4)
    for key, value in expected.items():
        torch.testing.assert_close(params[key], value, rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_trainer_fits_and_leaves_nothing(placement: str, precision: str) -> None:
    before = _allocated()
    module = Module("opt")
    first = trainer(GeminiStrategy(placement=placement), accelerator="cuda", devices=1, precision=precision)
    first.fit(module, loader("opt"), loader("opt"))
    assert module.losses[-1] < module.losses[0]
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in module.parameters())
    del first
    assert _allocated() <= before + 2**20  # cuBLAS keeps a workspace


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
