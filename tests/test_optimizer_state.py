"""The state of an optimizer by parameter, as torch writes and reads it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_gemini.core import ConfigurationError, Home, shard
from tests import cases
from tests.ranks import run_ranks


@pytest.mark.parametrize("home", list(Home))
@pytest.mark.parametrize("name", ["Unused", "OddShapes", "MlpInGroups", "channels_last"])
def test_state_is_torchs_own_and_goes_on(name: str, home: Home) -> None:
    plain, reference = train_on(cases.build(name), name, None, 0, 4)
    model, optimizer = train_on(cases.build(name), name, home, 0, 4, keep=True)
    saved = optimizer.saved
    assert_same_state(saved, reference.state_dict())

    # from here a plain optimizer, and one on other chunks, do the same
    file = io.BytesIO()
    torch.save(saved, file)
    plain, reference = train_on(plain, name, None, 4, 7, optimizer=reference)
    for other in (None, Home.FULL, Home.HOST):
        twin = cases.build(name)
        twin.load_state_dict(model.state_dict())
        if hasattr(twin, "calls"):
            twin.calls = 4
        file.seek(0)  # anew: torch's optimizers go on in the very tensors they are given
        twin, _ = train_on(twin, name, other, 4, 7, state=torch.load(file, weights_only=True))
        for (key, value), expected in zip(twin.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(value, expected), (key, other)


def train_on(
    model: nn.Module,
    name: str,
    home: Home | None,
    start: int,
    stop: int,
    keep: bool = False,
    optimizer: Optimizer | None = None,
    state: Any = None,
) -> tuple[nn.Module, Any]:
    optimizer = optimizer or cases.adamw(name, model)
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    engine = shard(model, [optimizer], home=home, chunk_size=2048, group=group) if home else None
    if state is not None:
        (engine.load_optimizer_state_dict(optimizer, state) if engine else optimizer.load_state_dict(state))
    for step in cases.batches(name, stop, ranks)[start:]:
        cases.CASES[name].loss(model, step[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    if engine and keep:
        optimizer.saved = engine.optimizer_state_dict(optimizer)
    if engine:
        engine.release()
    return model, optimizer


def assert_same_state(ours: dict, theirs: dict, **tolerance: float) -> None:
    assert ours["param_groups"] == theirs["param_groups"]
    # an empty parameter has nothing to remember
    theirs["state"] = {n: state for n, state in theirs["state"].items() if state["exp_avg"].numel()}
    assert ours["state"].keys() == theirs["state"].keys()
    for number, expected in theirs["state"].items():
        assert ours["state"][number].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(ours["state"][number][key], value, **tolerance or {"rtol": 0, "atol": 0})


def _states_on_ranks(names: list[str]) -> dict:
    return {name: train_on(cases.build(name), name, Home.DEVICE, 0, 4, keep=True)[1].saved for name in names}


def test_state_gathers_over_ranks() -> None:
    names = ["Unused", "OddShapes", "MlpInGroups"]
    first, second = run_ranks(_states_on_ranks, 2, names)
    for name in names:
        _, _, reference = cases.train_plain(name, 4, 2)
        assert_same_state(first[name], reference.state_dict(), rtol=1e-3, atol=1e-6)
        assert not second[name]["state"], "only rank 0 holds whole tensors"


def test_a_state_for_another_optimizer_is_refused() -> None:
    model = cases.build("Mlp")
    optimizer = cases.adamw("Mlp", model)
    engine = shard(model, [optimizer])
    other = torch.optim.AdamW([nn.Parameter(torch.ones(3))]).state_dict()
    with pytest.raises(ConfigurationError, match=r"checkpoint's optimizer has \[1\] parameters.*this AdamW has \[16\]"):
        engine.load_optimizer_state_dict(optimizer, other)
    wrong = torch.optim.AdamW([nn.Parameter(torch.ones(3)) for _ in range(16)])
    for param in wrong.param_groups[0]["params"]:
        param.grad = torch.ones(3)
    wrong.step()
    with pytest.raises(ConfigurationError, match="should have the parameter's shape"):
        engine.load_optimizer_state_dict(optimizer, wrong.state_dict())


def test_a_state_made_in_the_constructor_when_the_first_parameter_is_a_number() -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.scale, model.matrix = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(8, 8))
        return model

    results = []
    for home in (None, Home.FULL, Home.HOST):
        model = build()
        optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.3)
        engine = shard(model, [optimizer], home=home) if home else None
        for _ in range(3):
            with engine.forward() if engine else torch.enable_grad():
                loss = (model.matrix * model.scale).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if engine:
            engine.release()
        results.append(list(model.parameters()))
    for params in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(params, results[0], strict=True))


@pytest.mark.parametrize("home", list(Home))
def test_state_dicts_of_the_optimizer_itself(home: Home) -> None:
    """In a plain loop, without Lightning's checkpoints."""

    def steps(model: nn.Module, optimizer: Optimizer, numbers: range) -> None:
        for step in numbers:
            cases.CASES["Mlp"].loss(model, cases.batches("Mlp", 6, 1)[step][0]).backward()
            optimizer.step()
            optimizer.zero_grad()

    plain = cases.build("Mlp")
    theirs = cases.adamw("Mlp", plain)
    steps(plain, theirs, range(3))
    model = copy.deepcopy(plain)
    ours = cases.adamw("Mlp", model)
    engine = shard(model, [ours], home=home, chunk_size=2048)
    ours.load_state_dict(theirs.state_dict())
    steps(model, ours, range(3, 6))
    steps(plain, theirs, range(3, 6))
    saved, expected = ours.state_dict(), theirs.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(saved["state"], expected["state"], rtol=0, atol=0)
    engine.release()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
