"""Speeds are measured, steps are timed and predicted, and homes follow from it where they are to."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_gemini.core import Engine, Home, UpdatePolicy, shard
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.playbook import Known
from lightning_gemini.core.speedometer import exchange
from lightning_gemini.core.speeds import Speeds
from lightning_gemini.core.store import Store
from lightning_gemini.core.streams import Laps, best_seconds
from tests.outcomes import group, rank
from tests.placing import SPLIT, in_groups, language_model, lm_step
from tests.ranks import run_ranks

WIDTH, DEPTH = 256, 8
CHUNK = WIDTH * WIDTH
NEED = 16 * DEPTH * CHUNK


def matrices(
    rows: int = 16, share: int = 40, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Engine, Tensor]:
    """A stack of matrices, each a chunk, on a device that holds ``share`` percent of them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"device_memory": NEED * share // 100, "chunk_size": CHUNK + 64, **options}
    reduce_group = dist.new_group() if dist.is_initialized() else None
    engine = shard(model, [optimizer], group=group(), reduce_group=reduce_group, **options)
    return model, optimizer, engine, torch.randn(rows, WIDTH)


def steps(made: tuple[nn.Module, torch.optim.Optimizer, Engine, Tensor], count: int) -> Known:
    model, optimizer, engine, batch = made
    for _ in range(count):
        model(batch).square().mean().backward()
        optimizer.step()
    (known,) = engine._schedule.playbook.known
    return known


# How long moments take


class Slow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(x)


def test_a_moment_lasts_as_long_as_its_compute_and_not_as_the_wait_for_its_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(Slow(32, 32) for _ in range(6)))
    optimizer = torch.optim.SGD(model.parameters())
    engine = shard(model, [optimizer], chunk_size=1088, device_memory=30_000)
    start = Store.start

    def slowly(store: Store, *args: Any) -> None:
        time.sleep(0.2)
        start(store, *args)

    monkeypatch.setattr(Store, "start", slowly)
    model(torch.ones(2, 32)).sum().backward()
    monkeypatch.undo()
    optimizer.step()
    (known,) = engine._schedule.playbook.known
    forward = [moment.seconds for moment in known.trace.moments if not moment.backward]
    assert len(forward) == 6
    assert all(0.02 <= seconds < 0.2 for seconds in forward)
    assert all(0 < moment.seconds < 0.2 for moment in known.trace.moments)
    assert known.forecast is not None
    assert known.forecast.compute == pytest.approx(sum(moment.seconds for moment in known.trace.moments))


def test_laps() -> None:
    laps = Laps(torch.device("cpu"))
    laps.end()  # of none
    for pause in (0.01, 0.03):
        laps.begin()
        time.sleep(pause)
        laps.end()
        time.sleep(0.02)
    laps.begin()
    laps.begin()  # the one before ends
    found = laps.seconds()
    assert len(found) == 3
    assert found[0] >= 0.01
    assert found[1] >= 0.03


def test_the_best_of_many_repetitions_counts_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0005, 0.002, 0.001, 0.004, *[0.002] * 100])  # the first one loads kernels, and does not count
    now = [0.0]

    def work() -> None:
        now[0] += next(times)

    with monkeypatch.context() as patch:
        patch.setattr("lightning_gemini.core.streams.time.perf_counter", lambda: now[0])
        assert best_seconds(torch.device("cpu"), work) == pytest.approx(0.001)
    done: list[None] = []
    assert best_seconds(torch.device("cpu"), lambda: done.append(None), 5) > 0
    assert len(done) == 5


# Speeds


@pytest.mark.parametrize(
    "policy", [DtypePolicy(), SPLIT, DtypePolicy(torch.bfloat16), replace(SPLIT, state=torch.bfloat16)]
)
def test_speeds_are_measured_in_little_time_and_leave_nothing_behind(policy: DtypePolicy) -> None:
    _, _, engine, _ = matrices(policy=policy)
    tiers = engine.store.device, engine.store.host
    before = [(tier.used, tier.work) for tier in tiers]
    args = engine.store, engine._placement._footprints, True, "a word"
    exchange(*args)  # the first time kernels are loaded
    start = time.process_time()
    said, speeds = exchange(*args)
    assert time.process_time() - start < 0.5, "some ten times what it takes on an idle machine"
    assert said == ["a word"]
    assert speeds is not None
    assert speeds.gather is None
    assert all(1e4 < one < 1e13 for one in (speeds.fetch, speeds.offload, speeds.host_update, speeds.device_update))
    assert [(tier.used, tier.work) for tier in tiers] == before
    assert all(tier.capacity is None or tier.peak <= tier.capacity for tier in tiers)


def test_an_optimizer_without_a_rule_and_none_at_all() -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    engine = shard(model, [optimizer], placement="host", device_memory=2**20)
    _, speeds = exchange(engine.store, engine._placement._footprints, True, None)
    assert speeds is not None
    assert 1e4 < speeds.host_update < 1e13
    engine = shard(nn.Linear(64, 64), [], placement="host", device_memory=2**20)
    _, speeds = exchange(engine.store, engine._placement._footprints, True, None)
    assert speeds is not None
    assert speeds.host_update == speeds.device_update == math.inf


@pytest.mark.parametrize("name", ["device", "host"])
def test_where_there_is_no_room_nothing_is_measured_and_training_goes_on(name: str) -> None:
    made = _, _, engine, _ = matrices()
    tier = getattr(engine.store, name)
    capacity, tier.capacity = tier.capacity, tier.used + 100
    assert exchange(engine.store, engine._placement._footprints, True, None) == ([None], None)
    assert tier.used == tier.capacity - 100
    tier.capacity = capacity
    # with a little room less is done at a time
    tier.capacity = tier.used + 2**16
    assert exchange(engine.store, engine._placement._footprints, True, None)[1] is not None
    tier.capacity = capacity
    known = steps(made, 3)
    assert known.forecast is not None


def test_a_step_is_planned_without_speeds_if_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_gemini.core.placement.exchange", lambda store, footprints, near, said: ([said], None)
    )
    made = matrices()
    known = steps(made, 3)
    assert known.plan is not None
    assert (known.forecast, known.predicted) == (None, None)
    assert made[2].store.arrivals.patient, "nobody knows how long updates take"
    assert "predicted" not in made[2].memory_report()
    assert "s measured" in made[2].memory_report()


def _speeds_of_ranks() -> tuple[Speeds | None, tuple[bool, ...]]:
    made = matrices()
    steps(made, 3)
    engine = made[2]
    found = engine._placement._speeds, tuple(engine._placement._agreed)
    engine.release()
    return found


def test_ranks_agree_on_the_slowest_speeds() -> None:
    (speeds, homes), other = run_ranks(_speeds_of_ranks, 2)
    assert (speeds, homes) == other
    assert speeds is not None
    assert speeds.gather is not None
    assert 1e4 < speeds.gather < 1e13


def _patience_of_ranks(host_updates: tuple[float, float]) -> bool:
    speeds = Speeds(1e12, 1e12, None, host_updates[rank()], 1e12)
    with mock.patch("lightning_gemini.core.speedometer._measure", return_value=speeds):
        made = matrices()
        steps(made, 3)
    made[2].release()
    return made[2].store.arrivals.patient


@pytest.mark.parametrize(("host_updates", "patient"), [((1e12, 1e4), True), ((1e12, 1e12), False)])
def test_one_rank_with_slow_updates_has_all_of_them_put_gathers_off(
    host_updates: tuple[float, float], patient: bool
) -> None:
    assert run_ranks(_patience_of_ranks, 2, host_updates) == [patient, patient]


# Predictions


def test_a_prediction_is_near_the_measurement() -> None:
    """Within a factor of three; several attempts, since this machine may be busy with something else in between."""
    made = _, _, engine, _ = matrices(rows=2048)
    steps(made, 2)
    ratios = []
    for _ in range(5):
        engine._schedule.record_again()
        known = steps(made, 8)
        assert len(known.times) == 6
        assert known.predicted is not None
        assert known.measured is not None
        ratios.append(known.predicted / known.measured)
        if 1 / 3 < ratios[-1] < 3:
            return
    raise AssertionError(f"predicted / measured: {ratios}")


def test_the_report_and_the_timeline_say_what_is_predicted() -> None:
    made = matrices()
    known = steps(made, 4)
    report, timeline = made[2].memory_report(), made[2].timeline()
    assert known.forecast is not None
    assert known.measured is not None
    hidden = f"with {known.forecast.update_hidden_share:.0%} of the updates in host memory hidden"
    assert f"; {known.predicted:.3g} s predicted {hidden}; {known.measured:.3g} s measured\n" in report
    assert "\nspeeds: fetches " in report
    assert "parameters/s in host memory" in report
    assert timeline.predicted == known.predicted
    assert timeline.moments


def test_without_speeds_by_hand_the_fewest_bytes_count_on_an_emulated_device() -> None:
    homes = [steps(matrices(share=share), 2).plan for share in (30, 60) for _ in range(2)]
    assert homes[0] == homes[1]
    assert homes[2] == homes[3]


def _train(**options: Any) -> tuple[list[float], dict[str, Tensor], Engine, int]:
    """Losses, weights, the engine, and the homes on the device."""
    model = language_model()
    optimizers = in_groups(model)
    engine = shard(model, optimizers, policy=SPLIT, device_memory=3 * 2**20, chunk_size=65536, **options)
    losses = [lm_step(model, optimizers, seed) for seed in range(6)]
    near = sum(chunk.home is not Home.HOST for chunk in engine.store.chunks)
    with engine.summon(exact=True):
        weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return losses, weights, engine, near


def test_speeds_by_hand_change_homes_and_nothing_else() -> None:
    losses, weights, engine, few = _train()
    least = engine._schedule.playbook.known[0].plan
    slow_updates = Speeds(1e12, 1e12, None, 1e5, 1e12)
    other_losses, other_weights, engine, many = _train(speeds=slow_updates)
    known = engine._schedule.playbook.known[0]
    assert many > few
    assert engine._placement._speeds is slow_updates
    assert known.forecast is not None
    assert known.forecast.speeds is slow_updates
    assert least is not None
    assert known.plan is not None
    assert known.plan.moved > least.moved, "more bytes, less time"
    assert engine.counters.followed == 5
    assert known.predicted is not None
    assert known.predicted < 1.1 * (known.forecast.compute + known.forecast.host_update)
    assert losses == other_losses
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_on_a_gpu_the_first_step_is_cold_and_recorded_again() -> None:
    made = _, _, engine, _ = matrices()
    engine._placement._cold = True  # as it is there
    steps(made, 5)
    assert engine.counters.followed == 3
    assert not engine._placement._cold


@pytest.mark.parametrize("overlap", [True, False])
def test_predictions_know_whether_updates_are_made_in_the_background(overlap: bool) -> None:
    speeds = Speeds(1e12, 1e12, None, 1e5, 1e12)
    known = steps(matrices(update=UpdatePolicy(overlap=overlap), speeds=speeds), 3)
    assert known.forecast is not None
    # more than a second of updates, which nothing here hides wholly
    assert (known.forecast.update_hidden_share > 1e-6) is overlap
    assert known.forecast.waited_update > 0


def test_what_is_updated_within_the_backward_is_part_of_its_moments() -> None:
    known = steps(matrices(update=UpdatePolicy(when="in_backward")), 3)
    assert known.forecast is not None
    assert known.forecast.host_update == known.forecast.device_update == 0
