"""Every kind of model trains to the numbers of plain PyTorch: kept, freed, in host memory, on 1, 2 and 3 ranks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.core import Home, StateError, shard
from tests import cases
from tests.ranks import run_ranks

STEPS = 4


def train_sharded(name: str, home: Home, steps: int = STEPS) -> tuple[list[float], dict[str, torch.Tensor]]:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    case, model = cases.find(name), cases.build(name)
    optimizer = cases.adamw(name, model)
    engine = shard(
        model,
        [optimizer],
        group=dist.group.WORLD if ranks > 1 else None,
        reduce_group=dist.new_group() if ranks > 1 else None,
        home=home,
        chunk_size=2048,
        **case.options,
    )
    losses = []
    for step in cases.batches(name, steps, ranks):
        with engine.forward() if case.scoped else nullcontext():
            loss = case.loss(model, step[rank])
        case.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    engine.check_model()
    engine.release()
    assert engine.store.device.used == engine.store.host.used == 0
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("home", list(Home), ids=lambda home: home.value)
@pytest.mark.parametrize("name", cases.CASES)
def test_one_rank_is_bit_exact(name: str, home: Home) -> None:
    expected_losses, expected, _ = cases.train_plain(name, STEPS, 1)
    losses, params = train_sharded(name, home)
    assert losses == expected_losses
    for key, value in expected.named_parameters():
        assert torch.equal(params[key], value), key


@pytest.mark.parametrize("home", list(Home), ids=lambda home: home.value)
@pytest.mark.parametrize("name", cases.REFUSED)
def test_what_is_refused(name: str, home: Home) -> None:
    if home in cases.REFUSED[name].refused:
        with pytest.raises(StateError, match=cases.REFUSED[name].refused[home]):
            train_sharded(name, home)
    else:
        test_one_rank_is_bit_exact(name, home)


def _several(name: str, homes: list[Home]) -> list[Home]:
    return [home for home in homes if home in cases.CASES[name].several]


def _train_all(names: list[str], homes: list[Home]) -> dict:
    problems = {}
    for name in names:
        for home in _several(name, homes):
            losses, params = train_sharded(name, home)
            if dist.get_rank() == 0:
                problems[name, home] = (
                    losses,
                    {key: value.detach().clone() for key, value in params.items()},
                )
    return problems


def _check_ranks(names: list[str], homes: list[Home], ranks: int) -> None:
    results = run_ranks(_train_all, ranks, names, homes)[0]
    wrong = []
    for name in names:
        expected_losses, expected, _ = cases.train_plain(name, STEPS, ranks)
        for home in _several(name, homes):
            losses, params = results[name, home]
            try:
                torch.testing.assert_close(losses, expected_losses, rtol=2e-4, atol=2e-5)
                for key, value in expected.named_parameters():
                    tolerance = 5e-2 if value.dtype == torch.bfloat16 else 2e-3
                    torch.testing.assert_close(params[key], value.detach(), rtol=tolerance, atol=tolerance / 5)
            except AssertionError as error:
                wrong.append(f"{name} {home}: {error}")
    assert not wrong, "\n".join(wrong)


_NAMES = list(cases.CASES)


@pytest.mark.parametrize("names", [_NAMES[i : i + 12] for i in range(0, len(_NAMES), 12)], ids=lambda names: names[0])
def test_two_ranks(names: list[str]) -> None:
    _check_ranks(names, list(Home), 2)


def test_three_ranks() -> None:
    _check_ranks(
        ["MlpInGroups", "opt", "OddShapes", "Unused", "checkpoint_shared_reentrant"],
        [Home.FULL, Home.DEVICE],
        3,
    )
