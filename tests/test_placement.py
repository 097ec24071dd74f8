"""What moves on an emulated device that is too small, to the byte: never more than is planned, never over the bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_gemini.core import DtypePolicy, Engine, Home, OutOfBudgetError, UpdatePolicy, shard
from lightning_gemini.core.footprint import Footprints, working_set
from tests.placing import SPLIT, Moved, in_groups, language_model, lm_loss, lm_step, watched

FP32 = DtypePolicy()
POLICIES = {"bf16-mixed": SPLIT, "32-true": FP32}
BYTES = {"bf16-mixed": 2, "32-true": 4}

Trained = tuple[nn.Module, list[Optimizer], Engine]


def make(policy: DtypePolicy = SPLIT, **options: object) -> Trained:
    model = language_model()
    optimizers = in_groups(model)
    return model, optimizers, shard(model, optimizers, policy=policy, **options)


def footprints(engine: Engine) -> Footprints:
    return engine._placement._footprints


def need(policy: DtypePolicy = SPLIT) -> int:
    """Bytes on the device that keep everything there, by the layout."""
    _, _, engine = make(policy, placement="device")
    return sum(one.kept for one in footprints(engine).all())


def steady(made: Trained, steps: int = 3) -> dict[str, int]:
    """What one step moves once there is a plan; the same in each."""
    model, optimizers, engine = made
    for seed in range(2):
        lm_step(model, optimizers, seed)
    counted = Moved(engine)
    found = []
    for seed in range(steps):
        lm_step(model, optimizers, seed)
        found.append(counted.since())
    assert all(one == found[0] for one in found)
    assert found[0]["followed"] == 1
    return found[0]


def n_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("mode", POLICIES)
def test_host_moves_no_more_than_the_minimum(mode: str) -> None:
    """4 bytes of a bf16 parameter and micro-batch to the device, 2 to the host; in fp32 twice that."""
    size = BYTES[mode]
    made = make(POLICIES[mode], placement="host", device_memory=need(POLICIES[mode]) // 3)
    model, _, engine = made
    with watched(engine) as takes:
        step = steady(made)
    assert takes
    params = n_params(model)
    assert step["fetched_bytes"] <= 1.05 * 2 * size * params
    assert params * size <= step["offloaded_bytes"] <= 1.05 * size * params
    assert step["rehomed_bytes"] == 0
    assert all(chunk.home is Home.HOST for chunk in engine.store.chunks)
    # at least once, and twice but for what is kept at the turn: no more than the window
    at_turn = 4 * max(chunk.nbytes for chunk in engine.layout.chunks)
    assert step["fetched_bytes"] >= 2 * engine.layout.nbytes - at_turn
    # parameters, masters, states and gradients are there
    assert engine.store.host.used >= (14 if mode == "bf16-mixed" else 16) * params


@pytest.mark.parametrize("mode", POLICIES)
def test_a_step_moves_what_its_plan_says(mode: str) -> None:
    bound = need(POLICIES[mode])
    for share in (20, 50, 80):
        made = make(POLICIES[mode], device_memory=bound * share // 100)
        with watched(made[2]):
            step = steady(made)
        (known,) = made[2]._schedule.playbook.known
        assert known.plan is not None
        assert step["fetched_bytes"] == known.plan.fetched
        assert step["offloaded_bytes"] == known.plan.offloaded
        assert step["gathered_bytes"] == known.plan.gathered == 0
        assert step["unshards"] == len(known.plan.start) + sum(len(chunks) for chunks in known.plan.prefetch) + sum(
            index not in known.resident(at) for at, index in enumerate(known.trace.order) if _moves(made[2], index)
        )
        ahead = len(known.plan.start) + sum(len(chunks) for chunks in known.plan.prefetch)
        assert step["prefetched"] == ahead
        freed_by_plan = sum(len(chunks) for chunks in known.plan.evict)
        assert step["reshards"] == step["unshards"] >= freed_by_plan


def _moves(engine: Engine, chunk: int) -> bool:
    return engine.store.chunks[chunk].home is not Home.FULL


@pytest.mark.parametrize("mode", POLICIES)
def test_auto_moves_less_than_host_and_the_less_the_larger_the_device(mode: str) -> None:
    bound = need(POLICIES[mode])
    options = {"chunk_size": 32768}  # the same at each size
    host = steady(make(POLICIES[mode], placement="host", device_memory=bound // 5, **options))
    before = math.inf
    for share in (20, 35, 50, 70, 90):
        auto = steady(make(POLICIES[mode], device_memory=bound * share // 100, **options))
        assert auto["fetched_bytes"] <= host["fetched_bytes"]
        moved = auto["fetched_bytes"] + auto["offloaded_bytes"]
        assert moved <= min(before, host["fetched_bytes"] + host["offloaded_bytes"])
        before = moved
    assert before < 0.3 * (host["fetched_bytes"] + host["offloaded_bytes"])


@pytest.mark.parametrize("mode", POLICIES)
def test_nothing_moves_where_everything_fits(mode: str) -> None:
    model, optimizers, engine = make(POLICIES[mode], device_memory=need(POLICIES[mode]))
    counted = Moved(engine)
    for seed in range(2):
        lm_step(model, optimizers, seed)
    step = counted.since()
    assert not any(step[name] for name in ("fetched_bytes", "offloaded_bytes", "rehomed_bytes", "unshards"))


def test_nothing_moves_any_more_once_everything_fits() -> None:
    """A device that grows under a model that has been moving."""
    bound = need()
    made = model, optimizers, engine = make(device_memory=bound // 3)
    assert steady(made)["fetched_bytes"] > 0
    engine.rebudget(bound + 2 * engine.layout.nbytes)
    lm_step(model, optimizers, 0)
    step = steady(made)
    assert not any(step[name] for name in ("fetched_bytes", "offloaded_bytes", "rehomed_bytes", "unshards"))
    assert {chunk.home for chunk in engine.store.chunks} == {Home.FULL}


@pytest.mark.parametrize("placement", ["host", "auto"])
def test_halving_the_device_works_until_one_unit_does_not_fit(placement: str) -> None:
    capacity, losses, smallest = need(), [], 0
    with torch.no_grad():
        expected = [lm_loss(language_model(), 0).item()]
    refused = None
    while refused is None:
        capacity //= 2
        model = language_model()
        optimizers = in_groups(model)
        try:
            engine = shard(model, optimizers, placement=placement, device_memory=capacity, chunk_size=16384)
        except OutOfBudgetError as error:
            refused = str(error)
            break
        smallest = capacity
        with watched(engine):
            losses.append([lm_step(model, optimizers, seed) for seed in range(3)])
        assert engine.store.device.peak <= capacity
    assert all(row == losses[0] for row in losses)
    assert losses[0][0] == expected[0]
    assert "this model does not fit" in refused
    assert "the most for model.decoder" in refused or "the most for lm_head" in refused
    # the smallest that worked is no more than twice what is needed at one time
    least, _ = working_set(engine.layout, engine.units)
    assert smallest <= 2 * (2 * least + 4 * 16384 * 4)


def test_homes_fill_the_device_as_far_as_it_goes() -> None:
    bound = need()
    made = _, _, engine = make(device_memory=bound * 6 // 10, chunk_size=32768)
    steady(made)
    (known,) = engine._schedule.playbook.known
    near = [c.index for c in engine.store.chunks if c.home is Home.FULL]
    kept = [one.kept for one in footprints(engine).all()]
    assert known.plan is not None
    # not one more: the fullest moment, and a chunk more, would be over the bound
    trained = [kept[c.index] for c in engine.store.chunks if c.home is Home.HOST]
    full = [m.other + p for m, p in zip(known.trace.moments, known.plan.peak, strict=True)]
    assert max(full) <= bound * 6 // 10
    assert sum(kept[index] for index in near) > bound * 6 // 10 - 4 * max(trained)
    for chunks in engine.optimizers:
        for update in chunks.updates:
            assert update.state_bytes == pytest.approx(8 * update.chunk.spec.used, rel=0.01)
    beside = sum(u.state_bytes for c in engine.optimizers for u in c.updates if u.chunk.home is Home.FULL)
    assert beside > 0
    assert engine.store.device.used >= beside


def test_the_host_has_a_bound_too() -> None:
    bound = need()
    host = bound * 7 // 10
    made = _, _, engine = make(device_memory=bound * 7 // 10, host_memory=host, chunk_size=32768)
    with watched(engine):
        steady(made)
    assert engine.store.host.peak <= host
    with pytest.raises(OutOfBudgetError, match=r"this model does not fit(.|\n)*more host memory"):
        make(device_memory=bound // 3, host_memory=host, chunk_size=32768)


@pytest.mark.parametrize("placement", ["host", "auto"])
def test_micro_batches_move_parameters_each_and_gradients_in_fp32(placement: str) -> None:
    model, optimizers, engine = make(placement=placement, device_memory=need() // 3, chunk_size=32768)

    def step(seed: int) -> None:
        with engine.accumulate():
            lm_loss(model, seed).backward()
            lm_loss(model, seed + 1).backward()
        lm_step(model, optimizers, seed + 2)

    for seed in range(4):
        step(seed)
    counted = Moved(engine)
    with watched(engine):
        step(5)
    one = counted.since()
    assert (one["followed"], one["strayed"]) == (3, 0)
    elements = engine.layout.nbytes // 2
    assert one["fetched_bytes"] <= 3 * 4 * elements
    assert one["offloaded_bytes"] <= 3 * 4 * elements
    assert engine.counters.updates == 5 * len(engine.layout.chunks)


def test_an_update_in_the_backward_keeps_no_gradient() -> None:
    update = UpdatePolicy(when="in_backward")
    made = _, _, engine = make(placement="host", device_memory=need() // 3, update=update)
    with watched(engine):
        step = steady(made)
    assert step["updates"] == len(engine.layout.chunks)
    assert all(gradient.shard is None for gradient in engine._gradients.chunks.values())
    assert step["offloaded_bytes"] <= 1.05 * 2 * n_params(made[0])


def test_frozen_chunks_move_and_nothing_else_of_them() -> None:
    model = language_model()
    model.requires_grad_(False)
    model.model.decoder.final_layer_norm.requires_grad_(True)
    model.model.decoder.layers[3].self_attn.out_proj.requires_grad_(True)
    optimizers = in_groups(model)
    engine = shard(model, optimizers, placement="host", device_memory=2**21, policy=SPLIT, chunk_size=32768)
    trained = sum(c.nbytes for c in engine.layout.chunks if c.kind.trainable)
    counted = Moved(engine)
    for seed in range(3):
        lm_step(model, optimizers, seed)
        step = counted.since()
        assert step["offloaded_bytes"] == trained
        assert step["fetched_bytes"] > engine.layout.nbytes / 2
        assert step["updates"] == sum(c.kind.trainable for c in engine.layout.chunks)
    frozen = [c.index for c in engine.layout.chunks if not c.kind.trainable]
    assert not any(index in engine.store.masters and index in engine._gradients.chunks for index in frozen)
