"""Weights and optimizer states, saved by some ranks and loaded by others, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_gemini.checkpoint.plain import load_checkpoint, save_checkpoint
from lightning_gemini.core import DtypePolicy, Engine, Home, shard
from lightning_gemini.optim import Lion
from tests import cases
from tests.ranks import run_ranks

POLICIES = {
    "fp32": DtypePolicy(),
    "split": DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32),
    "fp32 masters": DtypePolicy(torch.bfloat16, master="fp32", reduce=torch.float32),
    "bf16 states": DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32, state=torch.bfloat16),
    "bf16": DtypePolicy(torch.bfloat16),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.05),
    "AMSGrad, torch's own": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True, foreach=False),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "Lion": lambda params: Lion(params, lr=0.001),
}
State = tuple[dict[str, Tensor], list[dict[str, Any]], int]


def build(
    name: str, policy: str, make: Callable[[Any], torch.optim.Optimizer], home: Home, chunk_size: int
) -> tuple[nn.Module, Engine]:
    model = cases.build(name)
    case = cases.CASES[name]
    optimizer = make(case.groups(model) if case.groups else model.parameters())
    group = dist.group.WORLD if dist.is_initialized() else None
    return model, shard(
        model, [optimizer], group=group, home=home, chunk_size=chunk_size, policy=POLICIES[policy], **case.options
    )


def train(name: str, model: nn.Module, engine: Engine, start: int, stop: int) -> None:
    rank, ranks = engine.store.collectives.rank, engine.store.collectives.world_size
    (optimizer,) = (chunks.optimizer for chunks in engine.optimizers)
    for step in cases.batches(name, stop, ranks)[start:]:
        batch = step[rank].to(engine.layout.params[0].dtype) if step[rank].is_floating_point() else step[rank]
        with engine.forward():
            loss = cases.CASES[name].loss(model, batch)
        with engine.backward():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, engine: Engine, extra: int = 0) -> State:
    """Everything whole, on rank 0."""
    states = [engine.optimizer_state_dict(chunks.optimizer) for chunks in engine.optimizers]
    with engine.summon(rank0_only=True, exact=True):
        return {key: value.clone() for key, value in model.state_dict().items()}, states, extra


def assert_same(ours: State, theirs: State) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine["param_groups"] == other["param_groups"]
        assert mine["state"].keys() == other["state"].keys()
        for number, state in other["state"].items():
            assert mine["state"][number].keys() == state.keys(), number
            torch.testing.assert_close(mine["state"][number], state, rtol=0, atol=0)
    assert ours[2] == theirs[2]


def host_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


@pytest.mark.parametrize("home", list(Home))
@pytest.mark.parametrize("policy", POLICIES)
def test_training_goes_on_to_the_bit(policy: str, home: Home, tmp_path: Path) -> None:
    for number, (name, make) in enumerate(OPTIMIZERS.items()):
        if policy == "bf16 states" and "own" in name:
            continue
        path = tmp_path / str(number)
        model, engine = build("Unused", policy, make, home, 2048)
        train("Unused", model, engine, 0, 3)
        save_checkpoint(engine, path, {"step": 3})
        saved = state_of(model, engine, 3)
        train("Unused", model, engine, 3, 6)
        straight = state_of(model, engine)
        engine.release()

        # the noise that rounds bf16 states goes by the chunk
        size = 2048 if policy == "bf16 states" else 4096
        model, engine = build("Unused", policy, make, Home.HOST if home is Home.FULL else Home.FULL, size)
        extra = load_checkpoint(engine, path)
        if hasattr(model, "calls"):
            model.calls = 3
        assert_same(state_of(model, engine, extra["step"]), saved)
        train("Unused", model, engine, 3, 6)
        assert_same(state_of(model, engine), straight)
        engine.release()


MODELS = ["Unused", "OddShapes", "MlpInGroups", "channels_last", "TiedWeight", "FrozenMiddle"]


def _save(folder: str, names: list[str]) -> list[State]:
    states = []
    for name in names:
        model, engine = build(name, "split", OPTIMIZERS["AdamW"], Home.HOST, 2048)
        train(name, model, engine, 0, 2)
        save_checkpoint(engine, f"{folder}/{name}", group=host_group())
        states.append(state_of(model, engine))
        engine.release()
    return states


def _load(folders: list[str], names: list[str]) -> list[State]:
    states = []
    for folder in folders:
        for name in names:
            model, engine = build(name, "fp32 masters", OPTIMIZERS["AdamW"], Home.FULL, 1024)
            load_checkpoint(engine, f"{folder}/{name}", group=host_group())
            train(name, model, engine, 0, 0)
            states.append(state_of(model, engine))
            engine.release()
    return states


def test_all_pairs_of_ranks(tmp_path: Path) -> None:
    ranks = (1, 2, 3, 4)
    saved = {count: run_ranks(_save, count, str(tmp_path / str(count)), MODELS, timeout=170)[0] for count in ranks}
    for count in ranks:
        loaded = run_ranks(_load, count, [str(tmp_path / str(other)) for other in ranks], MODELS, timeout=170)[0]
        for other, states in zip(ranks, range(0, len(loaded), len(MODELS)), strict=True):
            for mine, theirs in zip(loaded[states : states + len(MODELS)], saved[other], strict=True):
                assert_same(mine, theirs)
    shutil.rmtree(tmp_path)
