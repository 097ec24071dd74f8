"""ShardedWeightAveraging computes what torch's AveragedModel does, on shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_gemini import GeminiStrategy, ShardedWeightAveraging
from lightning_gemini.core import ConfigurationError
from tests.lightning_cases import Module, loader, on_ranks, trainer
from tests.ranks import run_ranks

PLACEMENTS = ["device", "host"]


class Reference(Callback):
    """The same with whole weights, in plain Lightning."""

    def __init__(self, decay: float | None, start_step: int = 0, every_n_steps: int = 1) -> None:
        self.decay, self.start, self.every = decay, start_step, every_n_steps
        self.seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        average = None if self.decay is None else get_ema_multi_avg_fn(self.decay)
        self.model = AveragedModel(pl_module.model, multi_avg_fn=average, use_buffers=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step != self.seen and step > self.start and (step - self.start) % self.every == 0:
            self.model.update_parameters(pl_module.model)
        self.seen = step

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.live = pl_module.model
        if not trainer.sanity_checking and self.model.n_averaged:
            pl_module.model = self.model.module.eval()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.model = self.live

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.model = self.model.module


def fit(name: str, strategy: Any, callback: Callback, **settings: Any) -> tuple[list[float], dict[str, Tensor], Tensor]:
    module = Module(name)
    run = trainer(strategy, callbacks=[callback], **settings)
    run.fit(module, loader(name), loader(name))
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    return module.losses, state, run.callback_metrics["val_loss"]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Mlp", {"decay": 0.7}),
        ("Mlp", {"decay": None, "start_step": 4}),
        ("ConvNet", {"decay": 0.5, "every_n_steps": 2}),
        ("FrozenBackbone", {"decay": 0.9}),
    ],
)
def test_equal_to_the_average_of_whole_weights(name: str, settings: dict[str, Any], placement: str) -> None:
    losses, state, metric = fit(name, "auto", Reference(**settings), accumulate_grad_batches=2)
    strategy = GeminiStrategy(placement=placement, chunk_size=2048)
    ours, found, logged = fit(name, strategy, ShardedWeightAveraging(**settings), accumulate_grad_batches=2)
    torch.testing.assert_close(ours, losses)
    assert found.keys() == state.keys()
    for key, value in state.items():
        if value.is_floating_point():  # torch averages counters, too
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logged, metric)


def _resume(folder: Path) -> list[dict[str, Tensor]]:
    on_ranks()
    straight = fit("Mlp", GeminiStrategy("host", chunk_size=2048), ShardedWeightAveraging(0.8), max_epochs=2)[1]
    saver = ModelCheckpoint(folder, save_last=True)
    run = trainer(max_epochs=1, callbacks=[ShardedWeightAveraging(0.8), saver], enable_checkpointing=True)
    run.fit(Module("Mlp"), loader(), loader())
    module = Module("Mlp")
    run = trainer(GeminiStrategy("host", chunk_size=2048), max_epochs=2, callbacks=[ShardedWeightAveraging(0.8)])
    run.fit(module, loader(), loader(), ckpt_path=folder / "epoch=0-step=6.ckpt")
    return [straight, {key: value.clone() for key, value in module.state_dict().items()}]


def test_two_ranks_and_a_resumed_run(tmp_path: Path) -> None:
    (straight, resumed), (other, _) = run_ranks(_resume, 2, tmp_path)
    expected = fit("Mlp", "auto", Reference(0.8), max_epochs=2)[1]
    torch.testing.assert_close(straight, expected, rtol=2e-3, atol=3e-4)
    torch.testing.assert_close(other, straight, rtol=0, atol=0)
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_masters_are_averaged_and_put_back() -> None:
    strategy = GeminiStrategy("host", chunk_size=2048)
    _, state, _ = fit("Mlp", strategy, ShardedWeightAveraging(1.0), precision="bf16-mixed")
    assert any(not torch.equal(value, value.bfloat16().float()) for value in state.values())
    plain = fit("Mlp", GeminiStrategy("host", chunk_size=2048), Callback(), precision="bf16-mixed")
    watched = fit("Mlp", GeminiStrategy("host", chunk_size=2048), ShardedWeightAveraging(0.9), precision="bf16-mixed")
    assert plain[0] == watched[0]  # training goes on with the weights, not with their average


class FailsInValidation(Module):
    def validation_step(self, batch: Any, index: int) -> None:
        if self.trainer.global_step == 6 and index == 2:
            raise ValueError("in validation")
        super().validation_step(batch, index)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_failure_in_validation_leaves_the_weights_and_validate_works_afterwards(placement: str) -> None:
    module, plain, tiers = FailsInValidation(), Module(), []
    run = trainer(GeminiStrategy(placement, chunk_size=2048), callbacks=[ShardedWeightAveraging(0.5)])
    module.on_train_start = lambda: tiers.extend((run.strategy.engine.store.device, run.strategy.engine.store.host))
    with pytest.raises(ValueError, match="in validation"):
        run.fit(module, loader(), loader())
    trainer("auto", max_epochs=1).fit(plain, loader())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert [tier.used for tier in tiers] == [0, 0]
    again = trainer(GeminiStrategy(placement), callbacks=[ShardedWeightAveraging(0.5)], max_epochs=1)
    again.fit(plain, loader(), loader())
    again.validate(plain, loader(), verbose=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"decay": 1.5}, "decay must be"), ({"start_step": -1}, "start_step must be"), ({"every_n_steps": 0}, "or more")],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ShardedWeightAveraging(**settings)


def test_another_strategy_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"lightning\.pytorch.callbacks\.WeightAveraging there"):
        trainer("auto", callbacks=[ShardedWeightAveraging()]).fit(Module(), loader())
