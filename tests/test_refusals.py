"""What does not fit is refused with the numbers, and what is counted is what is used."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_gemini.core import DtypePolicy, Engine, Home, OutOfBudgetError, placement, shard
from lightning_gemini.core.planner import plan
from tests.outcomes import group
from tests.placing import SPLIT, watched
from tests.ranks import run_ranks

SIZE = 1152  # elements of a layer, with padding; slots of host memory are as long in bf16 and fp32
CHUNK = SIZE * 4  # bytes in fp32

Made = tuple[nn.Sequential, torch.optim.Optimizer, Engine]


def make(count: int = 12, trained: int | None = None, **options: Any) -> Made:
    """``count`` layers, of which the last ``trained`` (all by default) are not frozen; a chunk for each."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(33, 33, bias=False) for _ in range(count)))
    for layer in list(model)[: 0 if trained is None else count - trained]:
        layer.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    reduce_group = dist.new_group() if dist.is_initialized() else None
    options = {"chunk_size": SIZE, "group": group(), "reduce_group": reduce_group, **options}
    return model, optimizer, shard(model, [optimizer], **options)


def step(made: Made) -> None:
    model, optimizer, engine = made
    model(torch.ones(4, 33, dtype=engine.layout.params[0].dtype)).square().mean().backward()
    optimizer.step()


def rows(error: OutOfBudgetError) -> dict[str, str]:
    """The rows of the table, by their names."""
    found = (re.fullmatch(r"  (\S.*?)  +(\S.*)", line) for line in str(error).splitlines())
    return {match[1]: match[2] for match in found if match}


# Masters of frozen chunks


@pytest.mark.parametrize("device", [5, 12])
def test_masters_of_frozen_chunks_are_part_of_what_the_host_needs(device: int) -> None:
    """In bf16-mixed a frozen fp32 parameter keeps its low half in host memory."""
    options = {"trained": 3, "policy": SPLIT, "device_memory": device * CHUNK}
    _, _, engine = make(**options)
    aside = 9 * SIZE * 2
    assert engine._placement._footprints.aside == aside
    assert sum(engine.store.masters[index].part.nbytes for index in range(9)) == aside
    kept = sum(one.kept for one in engine._placement._footprints.all())
    need = aside + kept
    with pytest.raises(OutOfBudgetError, match="1 B more host memory") as refused:
        make(placement="host", host_memory=need - 1, **options)
    assert rows(refused.value)["host memory"].endswith("masters of frozen parameters 20.25 KiB")
    made = make(placement="host", host_memory=need, **options)
    with watched(made[2]):
        for _ in range(3):
            step(made)
    assert made[2].store.host.peak <= need


def test_plans_leave_room_for_masters_of_frozen_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(placement, "plan", lambda *args, **options: seen.append(args[3]) or plan(*args, **options))
    made = make(trained=6, policy=SPLIT, device_memory=11 * CHUNK, host_memory=40 * CHUNK)
    step(made)
    assert seen == [40 * CHUNK - 6 * SIZE * 2]


@pytest.mark.parametrize("where", ["device", "auto"])
def test_a_model_that_is_kept_has_masters_of_frozen_chunks_in_host_memory(where: str) -> None:
    options = {"placement": where, "trained": 3, "policy": SPLIT}
    with pytest.raises(OutOfBudgetError, match="1 B more host memory") as refused:
        make(host_memory=9 * SIZE * 2 - 1, **options)
    assert "device_memory of" not in str(refused.value)
    assert rows(refused.value)["host memory"].startswith("20.25 KiB  20.25 KiB")
    assert "masters of frozen parameters 20.25 KiB" in rows(refused.value)["host memory"]
    made = make(host_memory=9 * SIZE * 2, **options)
    step(made)
    assert not made[2].moving


@pytest.mark.parametrize("built", [torch.float32, torch.bfloat16])
def test_the_master_of_what_is_unfrozen_moves_with_its_chunk(built: torch.dtype) -> None:
    """Whether it was there from the beginning (fp32) or is made when the chunk is unfrozen (bf16)."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(33, 33, bias=False, dtype=built) for _ in range(6)))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = shard(model, [optimizer], policy=SPLIT, chunk_size=SIZE, device_memory=14 * CHUNK)
    made, homes, (frozen, *_) = (model, optimizer, engine), [], engine.store.chunks
    step(made)
    model[0].requires_grad_(True)
    step(made)
    for capacity in (8, 100, 8):
        engine.rebudget(capacity * CHUNK)
        step(made)
        homes.append(frozen.home)
        assert engine.store.masters[frozen.index].tier is engine.store.tier_of(frozen)
    assert homes == [Home.HOST, Home.FULL, Home.HOST]


# Remedies


def remedies(policy: DtypePolicy, built: torch.dtype = torch.float32) -> str:
    model = nn.Linear(64, 64, dtype=built)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(OutOfBudgetError) as refused:
        shard(model, [optimizer], policy=policy, placement="host", host_memory=1000)
    return str(refused.value).partition("What would make it fit")[2]


def test_mixed_precision_is_only_offered_to_parameters_in_fp32() -> None:
    assert "precision='bf16-mixed'" in remedies(DtypePolicy())
    assert "precision='bf16-mixed'" not in remedies(DtypePolicy(), torch.bfloat16)
    assert "precision='bf16-mixed'" not in remedies(DtypePolicy(torch.bfloat16))
    assert "precision='bf16-mixed'" not in remedies(SPLIT)


# Inside a step


def kib(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"B": 1 / 1024, "KiB": 1, "MiB": 1024}[unit]


@pytest.mark.parametrize("home", [Home.HOST, Home.DEVICE])
def test_what_does_not_fit_in_the_middle_of_a_step_is_a_table(home: Home) -> None:
    homes = 0 if home is Home.HOST else 12 * CHUNK
    engine = make(home=home, device_memory=homes + 2 * CHUNK)[2]
    for chunk in engine.store.chunks[:2]:
        engine._schedule.acquire(chunk, "a test")
    with pytest.raises(OutOfBudgetError, match=r"^chunk 2 for a test needs 4.50 KiB of device memory, for ") as error:
        engine._schedule.acquire(engine.store.chunks[2], "a test")
    table = rows(error.value)
    assert kib(table["homes of chunks, with masters, states and gradients"]) == homes / 1024
    assert kib(table["unsharded chunks in use"]) == 2 * CHUNK / 1024
    assert kib(table["unsharded chunks that are idle or under way"]) == 0
    assert kib(table["gradient buffers, and what an update makes for itself"]) == 0
    assert kib(table["asked for"]) == CHUNK / 1024
    assert kib(table["needed"]) == (homes + 3 * CHUNK) / 1024
    assert kib(table["available"]) == (homes + 2 * CHUNK) / 1024
    assert f"- a device_memory of {table['needed']} or more" in str(error.value)
    assert ("placement='auto'" in str(error.value)) is (home is Home.DEVICE)


def test_gradient_buffers_are_a_row_of_it() -> None:
    """Two layers in each chunk, and one of each used: the first gradient's buffer waits for what does not come."""
    layers, _, engine = make(home=Home.HOST, chunk_size=2 * SIZE, device_memory=4 * CHUNK, count=4)
    assert len(engine.layout.chunks) == 2
    loss = layers[2](layers[1](torch.ones(4, 33)).tanh()).square().mean()
    with pytest.raises(OutOfBudgetError, match=r"^the gradient of chunk 0 needs 9.00 KiB of device memory") as error:
        loss.backward()
    table = rows(error.value)
    assert kib(table["unsharded chunks in use"]) == 9
    assert kib(table["gradient buffers, and what an update makes for itself"]) == 9
    assert kib(table["needed"]) == 27


# Another size of the device


def test_a_device_without_a_bound_has_no_limit_any_more() -> None:
    made = make(device_memory=8 * CHUNK)
    step(made)
    assert made[2]._schedule.limit is not None
    made[2].rebudget(None)
    assert made[2]._schedule.limit is None
    made[2].rebudget(9 * CHUNK)
    assert made[2]._schedule.limit is not None


def test_what_is_kept_cannot_get_less_than_it_needs() -> None:
    made = make(device_memory=100 * CHUNK)
    assert not made[2].moving
    needed = 12 * (2 * CHUNK + 2 * 33 * 33 * 4)  # with gradients and states, which are not there yet
    with pytest.raises(OutOfBudgetError, match=r"210.09 KiB of device memory are taken.*the old size stays"):
        made[2].rebudget(needed - 1)
    assert made[2].store.device.capacity == 100 * CHUNK
    made[2].rebudget(needed)
    with watched(made[2]):
        for _ in range(2):
            step(made)
    assert made[2].store.device.peak <= needed


def test_homes_that_no_step_has_moved_yet_cannot_get_less_than_they_take() -> None:
    footprints = make()[2]._placement._footprints
    host = sum(one.kept for one in footprints.all()) - 6 * CHUNK
    engine = make(device_memory=16 * CHUNK, host_memory=host)[2]
    assert engine.moving
    homes = sum(chunk.home is Home.FULL for chunk in engine.store.chunks)
    assert homes > 0
    limit = engine._schedule.limit
    with pytest.raises(OutOfBudgetError, match="the old size stays"):
        engine.rebudget(homes * (2 * CHUNK + 2 * 33 * 33 * 4) - 1)
    assert (engine.store.device.capacity, engine._schedule.limit) == (16 * CHUNK, limit)


def _one_rank_holds_more() -> tuple[str, int | None, int]:
    made = make(device_memory=60 * CHUNK)
    engine = made[2]
    step(made)
    if dist.get_rank() == 1:
        engine.store.device.take(30 * CHUNK, "something of this rank alone")
    with pytest.raises(OutOfBudgetError) as refused:
        engine.rebudget(40 * CHUNK)
    if dist.get_rank() == 1:
        engine.store.device.give(30 * CHUNK)
    step(made)
    return str(refused.value), engine.store.device.capacity, engine.counters.updates


def test_all_ranks_refuse_together() -> None:
    ours, theirs = run_ranks(_one_rank_holds_more, 2)
    assert ours == theirs
    assert ours[1:] == (60 * CHUNK, 24)
