"""Memory that runs out under a Trainer: all ranks raise, keep their weights and fit again in the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gemini import GeminiStrategy
from lightning_gemini.core import PeerError, StepFailedError
from lightning_gemini.core.memory import Allocator
from tests.lightning_cases import Module, loader, on_ranks, trainer
from tests.outcomes import rank
from tests.ranks import RankError, run_ranks

STRATEGIES: dict[str, dict[str, Any]] = {
    "kept": {"placement": "device"},
    "auto": {"placement": "auto", "device_memory": "150KiB", "chunk_size": 1088},
    "host": {"placement": "host", "chunk_size": 1088},
}


class Greedy(Module):
    """Has no memory left in its third step, on the last rank."""

    where = "forward"
    error: type[Exception] = torch.OutOfMemoryError
    fails_at = 2

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        greedy = self.trainer.global_step == self.fails_at and rank() == self.trainer.world_size - 1
        if greedy and self.where == "forward":
            raise self.error("the device is full")
        if greedy:
            loss.register_hook(self._fail)
        return loss

    def _fail(self, *_: Any) -> None:
        raise self.error("the device is full")


class GreedyAtOnce(Greedy):
    """In its first step, which is being recorded."""

    fails_at = 0


def _weights(module: Module) -> list[Tensor]:
    return [param.detach().clone() for param in module.parameters()]


def _fit_twice(strategy: str, where: str, error: type[Exception], settings: dict[str, Any]) -> list[Any]:
    if dist.is_initialized():
        on_ranks()
    module = Greedy()
    module.where, module.error = where, error  # type: ignore[misc]
    with pytest.raises((StepFailedError, PeerError, ValueError)) as raised:
        trainer(GeminiStrategy(**STRATEGIES[strategy]), **settings).fit(module, loader())
    after = _weights(module)
    module.fails_at = -1  # type: ignore[misc]
    trainer(GeminiStrategy(**STRATEGIES[strategy]), max_steps=2, **settings).fit(module, loader(batch_size=2))
    return [f"{type(raised.value).__name__}: {raised.value}", after, _weights(module)]


def _plain(settings: dict[str, Any]) -> list[list[Tensor]]:
    module = Module()
    trainer("auto", max_steps=2, **settings).fit(module, loader())
    after = _weights(module)
    trainer("auto", max_steps=2, **settings).fit(module, loader(batch_size=2))
    return [after, _weights(module)]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_fits_again(strategy: str, where: str) -> None:
    said, *values = _fit_twice(strategy, where, torch.OutOfMemoryError, {})
    assert said.startswith("StepFailedError: memory ran out in ")
    for ours, theirs in zip(values, _plain({}), strict=True):
        assert all(map(torch.equal, ours, theirs))


#: What runs: where it fails, with what, and how the Trainer is set.
_RUNS: list[tuple[str, str, type[Exception], dict[str, Any]]] = [
    *((strategy, "forward", torch.OutOfMemoryError, {}) for strategy in STRATEGIES),
    *((strategy, "backward", torch.OutOfMemoryError, {"gradient_clip_val": 0.05}) for strategy in STRATEGIES),
    ("host", "forward", torch.OutOfMemoryError, {"accumulate_grad_batches": 2}),
    ("kept", "backward", torch.OutOfMemoryError, {"accumulate_grad_batches": 2}),
    ("host", "forward", ValueError, {}),
]


def _run_all() -> list[list[Any]]:
    return [_fit_twice(*run) for run in _RUNS]


def test_two_ranks_fit_again_after_one_has_failed() -> None:
    for run, ours, theirs in zip(_RUNS, *run_ranks(_run_all, 2, timeout=170), strict=True):
        if run[2] is ValueError:
            assert ours[0] == "PeerError: rank 1 failed: ValueError: the device is full"
            assert theirs[0] == "ValueError: the device is full"
        else:
            assert ours[0] == theirs[0]
            assert ours[0].startswith("StepFailedError: memory ran out on rank 1 in "), ours[0]
        for values in (ours[1:], theirs[1:]):
            for mine, plain in zip(values, _plain(run[3]), strict=True):
                torch.testing.assert_close(mine, plain, rtol=2e-3, atol=3e-4)


def _fail_at_once() -> None:
    on_ranks()
    trainer(GeminiStrategy(**STRATEGIES["host"])).fit(GreedyAtOnce(), loader())


class Full(Greedy):
    """Has no memory for anything any more."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.trainer.global_step == 2 and rank() == 1:
            self.trainer.strategy.engine.store.device.allocator = Refuses()
        return super().training_step(batch, index)


class Refuses(Allocator):
    def run(self, make: Any) -> Any:
        raise torch.OutOfMemoryError("the device is full")


def _fail_for_good() -> None:
    on_ranks()
    trainer(GeminiStrategy(**STRATEGIES["host"])).fit(Full(), loader())


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (_fail_for_good, "But the other ranks could not be told"),  # it cannot even take part
        (_fail_at_once, "it is not known what the others will do"),  # the step goes by no plan
    ],
)
def test_a_failure_that_cannot_be_drained_ends_the_other_ranks(run: Callable[[], None], why: str) -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(run, 2, timeout=60)
    said = str(raised.value)
    assert "did not end" not in said
    assert why in said
    assert "OutOfBudgetError: memory ran out on rank 1 in " in said
    assert "PeerError: rank 1 failed: OutOfBudgetError: memory ran out on rank 1" in said
