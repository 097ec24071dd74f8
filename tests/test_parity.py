"""Every kind of model trains to the numbers of plain PyTorch: kept, freed, in host memory, on 1, 2 and 3 ranks.

And moved by a plan between host memory and a device that is too small for it.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.core import Engine, Home, OutOfBudgetError, StateError, shard
from tests import cases
from tests.outcomes import rank as this_rank
from tests.outcomes import ranks as how_many_ranks
from tests.ranks import run_ranks

STEPS = 4

#: Percent of what a model needs on the device to be kept there; the next is for models of few units, whose largest
#: needs more with its gradients. All of it is never given.
SHARES = (40, 50, 60, 70, 80)
SHARES_OF_SEVERAL = (80,)  # whole gradients in reduction are most of what such small models take
TOO_SMALL = {"some_ranks_as_unit", "mixture_as_unit", "meta_learning"}  # with that they do not fit, on any rank

#: A home of all chunks, without a bound; or a placement, under a bound that is too small for the model.
Where = Home | Literal["host", "auto"]
EVERYWHERE: list[Where] = [*Home, "host", "auto"]

Trained = tuple[list[float], dict[str, torch.Tensor]]


def train_sharded(name: str, where: Where, steps: int = STEPS) -> Trained:
    if isinstance(where, Home):
        return train(name, steps, home=where)[:2]
    need = device_need(name)
    for share in SHARES if how_many_ranks() == 1 else SHARES_OF_SEVERAL:
        device_memory = need * share // 100
        try:
            losses, params, engine = train(name, steps, placement=where, device_memory=device_memory)
        except OutOfBudgetError:  # on all ranks, or the others would wait
            continue
        assert engine.store.device.peak <= device_memory < need
        assert engine.moving
        assert where == "auto" or engine.counters.fetched_bytes > 0
        return losses, params
    raise AssertionError(f"{name} does not train with a part of the {need} bytes that it needs")


@cache
def device_need(name: str) -> int:
    """Bytes that the model needs on the device of each rank to be kept there."""
    return train(name, 2, placement="device")[2].store.device.peak


def train(name: str, steps: int, **options: Any) -> tuple[list[float], dict[str, torch.Tensor], Engine]:
    """Losses, parameters and the engine, released."""
    rank, ranks = this_rank(), how_many_ranks()
    case, model = cases.find(name), cases.build(name)
    optimizer = cases.adamw(name, model)
    engine = shard(
        model,
        [optimizer],
        group=dist.group.WORLD if ranks > 1 else None,
        reduce_group=dist.new_group() if ranks > 1 else None,
        chunk_size=2048,
        **options,
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
    return losses, dict(model.named_parameters()), engine


def _label(where: Where) -> str:
    return where.value if isinstance(where, Home) else f"placement_{where}"


@pytest.mark.parametrize("where", EVERYWHERE, ids=_label)
@pytest.mark.parametrize("name", cases.CASES)
def test_one_rank_is_bit_exact(name: str, where: Where) -> None:
    expected_losses, expected = _plain(name)
    losses, params = train_sharded(name, where)
    assert losses == expected_losses
    for key, value in expected.items():
        assert torch.equal(params[key], value), key


@cache
def _plain(name: str) -> Trained:
    losses, model, _ = cases.train_plain(name, STEPS, 1)
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("home", list(Home), ids=lambda home: home.value)
@pytest.mark.parametrize("name", cases.REFUSED)
def test_what_is_refused(name: str, home: Home) -> None:
    if home in cases.REFUSED[name].refused:
        with pytest.raises(StateError, match=cases.REFUSED[name].refused[home]):
            train_sharded(name, home)
    else:
        test_one_rank_is_bit_exact(name, home)


def _several(name: str, everywhere: list[Where]) -> list[Where]:
    allowed = cases.CASES[name].several

    def runs(where: Where) -> bool:  # what a plan moves is freed, as it is with a home in host memory
        return where in allowed if isinstance(where, Home) else Home.HOST in allowed and name not in TOO_SMALL

    return [where for where in everywhere if runs(where)]


def _train_all(names: list[str], everywhere: list[Where]) -> dict:
    results = {}
    for name in names:
        for where in _several(name, everywhere):
            losses, params = train_sharded(name, where)
            if dist.get_rank() == 0:
                results[name, where] = (
                    losses,
                    {key: value.detach().clone() for key, value in params.items()},
                )
    return results


def _check_ranks(names: list[str], everywhere: list[Where], ranks: int) -> None:
    results = run_ranks(_train_all, ranks, names, everywhere)[0]
    wrong = []
    for name in names:
        expected_losses, expected, _ = cases.train_plain(name, STEPS, ranks)
        for where in _several(name, everywhere):
            losses, params = results[name, where]
            try:
                torch.testing.assert_close(losses, expected_losses, rtol=2e-4, atol=2e-5)
                for key, value in expected.named_parameters():
                    tolerance = 5e-2 if value.dtype == torch.bfloat16 else 2e-3
                    torch.testing.assert_close(params[key], value.detach(), rtol=tolerance, atol=tolerance / 5)
            except AssertionError as error:
                wrong.append(f"{name} {where}: {error}")
    assert not wrong, "\n".join(wrong)


_NAMES = list(cases.CASES)


@pytest.mark.parametrize("names", [_NAMES[i : i + 12] for i in range(0, len(_NAMES), 12)], ids=lambda names: names[0])
def test_two_ranks(names: list[str]) -> None:
    _check_ranks(names, [*Home, "auto"], 2)


def test_two_ranks_with_all_homes_in_host_memory() -> None:
    _check_ranks(
        ["MlpInGroups", "opt", "llama_checkpoint_reentrant", "mixtral", "TiedWeight", "lora_llama", "FrozenMiddle"],
        ["host"],
        2,
    )


def test_three_ranks() -> None:
    _check_ranks(
        ["MlpInGroups", "opt", "OddShapes", "Unused", "checkpoint_shared_reentrant"],
        [Home.FULL, Home.DEVICE, "auto"],
        3,
    )
