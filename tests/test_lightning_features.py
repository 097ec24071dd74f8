"""Lightning's features, one function each: what they give with chunks is what they give in plain Lightning."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_gemini import GeminiStrategy
from tests.lightning_cases import Module, as_file, dataset, loader, trainer
from tests.test_strategy import STRATEGIES

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

Make = Callable[..., L.Trainer]
Feature = Callable[[Make, Path], Any]
FEATURES: list[Feature] = []
#: equal to rounding: a norm is summed in another order
ROUNDED = {"clip_by_hand", "configure_gradient_clipping"}


def feature(function: Feature) -> Feature:
    FEATURES.append(function)
    return function


def weights(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def facts(run: L.Trainer, module: Module) -> dict[str, Any]:
    metrics = {key: value.clone() for key, value in run.callback_metrics.items()}
    return {"losses": module.losses, "metrics": metrics, "steps": run.global_step, "epoch": run.current_epoch,
            "weights": weights(module)}  # fmt: skip


def train(make: Make, module: Module | None = None, data: Any = None, **settings: Any) -> dict[str, Any]:
    module = module or Module()
    run = make(**settings)
    run.fit(module, loader() if data is None else data, loader())
    assert len(set(module.losses)) > 1 or run.barebones
    return facts(run, module)


def assert_same(ours: Any, theirs: Any, **tolerance: float) -> None:
    pairs = list(zip(tree_leaves(ours), tree_leaves(theirs), strict=True))
    assert pairs
    for mine, expected in pairs:
        if isinstance(expected, str | None):
            assert mine == expected
        else:
            torch.testing.assert_close(mine, expected, **({"rtol": 0, "atol": 0, "equal_nan": True} | tolerance))


# How long a run lasts, and on what


@feature
def limits(make: Make, _: Path) -> Any:
    module = Module()
    fit = train(make, module, limit_train_batches=0.5, limit_val_batches=1)
    assert len(module.losses) == 6
    run = make(limit_test_batches=2, limit_predict_batches=0.34)
    assert len(run.predict(module, loader())) == 2
    return fit, run.test(module, loader(), verbose=False)


@feature
def fast_dev_run_and_barebones(make: Make, _: Path) -> Any:
    runs = train(make, fast_dev_run=2), train(make, barebones=True)
    assert [len(r["losses"]) for r in runs] == [2, 12]
    assert not runs[1]["metrics"]
    return runs


@feature
def overfit_batches(make: Make, _: Path) -> Any:
    fit = train(make, data=DataLoader(dataset(), 4, shuffle=True), overfit_batches=2)
    assert len(fit["losses"]) == 4
    return fit


@feature
def min_steps_max_steps_max_time(make: Make, _: Path) -> Any:
    class Stop(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            self.trainer.should_stop = True
            return super().training_step(batch, index)

    runs = [train(make, Stop(), min_steps=9), train(make, max_steps=7, max_epochs=-1)]
    timed = train(make, max_time={"seconds": 0.3}, max_epochs=-1, limit_val_batches=0)
    assert [r["steps"] for r in runs] == [9, 7]
    assert timed["steps"] > 0
    return runs


@feature
def timer_and_early_stopping(make: Make, _: Path) -> Any:
    timer, stop = cb.Timer(), cb.EarlyStopping("val_loss", min_delta=0.02, patience=0)
    fit = train(make, Module(lr=0.003), callbacks=[timer, stop], max_epochs=10)
    assert timer.time_elapsed("train") > 0
    assert 0 < stop.stopped_epoch < 9
    return fit, stop.stopped_epoch, stop.best_score


@feature
def leaving_an_epoch_early(make: Make, _: Path) -> Any:
    module = Module()
    module.on_train_batch_start = lambda batch, index: -1 if index == 4 else None
    fit = train(make, module, accumulate_grad_batches=3)
    assert len(module.losses) == 8
    return fit


class Events(cb.Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name not in ("on_load_checkpoint", "on_save_checkpoint"):
            return lambda *_, **__: self.seen.append(name)
        return super().__getattribute__(name)


@feature
def hooks_in_order_with_sanity_validation_first(make: Make, _: Path) -> Any:
    events = Events()
    fit = train(make, callbacks=[events], num_sanity_val_steps=-1, accumulate_grad_batches=2)
    assert events.seen.index("on_validation_batch_end") < events.seen.index("on_train_start")
    assert events.seen[: events.seen.index("on_train_start")].count("on_validation_batch_end") == 6
    return fit, events.seen


@feature
def validation_every_n_steps(make: Make, _: Path) -> Any:
    runs = []
    by_steps, across_epochs = {"val_check_interval": 2}, {"val_check_interval": 4, "check_val_every_n_epoch": None}
    for extra, times in ((by_steps, 6), (across_epochs, 3), ({"check_val_every_n_epoch": 2}, 1)):
        events = Events()
        runs.append(train(make, callbacks=[events], num_sanity_val_steps=0, **extra))
        assert events.seen.count("on_validation_start") == times
    return runs


# Data


@feature
def combined_loaders(make: Make, _: Path) -> Any:
    class Two(Module):
        def loss(self, batch: Any) -> Tensor:
            pair = batch if isinstance(batch, dict) else batch[0]
            parts = [super(Two, self).loss(value) for value in pair.values() if value is not None]
            assert parts
            return sum(parts) / len(parts)

    def loaders(mode: str) -> CombinedLoader:
        return CombinedLoader({"a": loader(), "b": loader(batch_size=8)}, mode)

    runs, lengths = [], []
    for mode in ("min_size", "max_size_cycle", "max_size"):
        module, run = Two(), make(max_epochs=1)
        run.fit(module, loaders(mode))
        lengths.append(len(module.losses))
        runs.append((facts(run, module), run.test(module, loaders(mode), verbose=False)))
    assert lengths == [3, 6, 6]
    one_by_one = Module()
    one_by_one.test_step = lambda batch, index, dataloader_idx=0: one_by_one.log("l", one_by_one.loss(batch))
    tested = make().test(one_by_one, loaders("sequential"), verbose=False)
    assert len(tested) == 2
    return runs, tested


@feature
def reloading(make: Make, _: Path) -> Any:
    class Reload(Module):
        asked = 0

        def train_dataloader(self) -> DataLoader:
            self.asked += 1
            return loader(batch_size=2 * self.asked)

    module, run = Reload(), make(reload_dataloaders_every_n_epochs=1)
    run.fit(module)
    assert module.asked == 2
    assert len(module.losses) == 11 + 6
    return facts(run, module)


class Data(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.batch_size = 4

    def prepare_data(self) -> None:
        self.events.append("prepare")

    def setup(self, stage: str) -> None:
        self.events.append(f"setup {stage.value}")

    def teardown(self, stage: str) -> None:
        self.events.append(f"teardown {stage.value}")

    def train_dataloader(self) -> DataLoader:
        return loader(batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [value * 1.5 for value in batch]


@feature
def data_module(make: Make, _: Path) -> Any:
    module, data, run = Module(), Data(), make(max_epochs=1)
    run.fit(module, datamodule=data)
    fit = facts(run, module)
    tested = run.test(module, datamodule=data, verbose=False)
    prepared = ["prepare"] * (run.local_rank == 0)
    assert data.events == [*prepared, "setup fit", "teardown fit", *prepared, "setup test", "teardown test"]
    return fit, tested


@feature
def predictions(make: Make, folder: Path) -> Any:
    class Writer(cb.BasePredictionWriter):
        written = 0

        def write_on_batch_end(self, *_: Any) -> None:
            self.written += 1

    module, writer = Module(), Writer("batch")
    out = make().predict(module, loader())
    make(callbacks=[writer]).predict(module, loader(), return_predictions=False)
    assert writer.written == len(out) == 6
    assert all(o.device.type == "cpu" and not o.requires_grad for o in out)
    return [o.square().mean() for o in out]


@feature
def one_trainer_fits_twice_and_several_take_turns(make: Make, _: Path) -> Any:
    first, second, run = Module(), Module("MlpInGroups"), make(max_epochs=1)
    run.fit(first, loader())
    run.fit_loop.max_epochs = 2
    run.fit(first, loader())
    assert len(first.losses) == 12
    return facts(run, first), [train(make, module) for module in (second, first, second)]


def failing(place: str, error: type[BaseException] = ArithmeticError) -> Module:
    """Raises in the third batch, or in the second epoch's validation."""
    module, calls = Module(), iter(range(1000))
    owner, name = (module.model.layers[2], "forward") if place == "forward" else (module, place)
    original, at = getattr(owner, name), 8 if name == "validation_step" else 2

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error("boom")
        return original(*args, **kwargs)

    setattr(owner, name, fail)
    return module


PLACES = ("forward", "training_step", "backward", "on_before_optimizer_step", "on_after_backward", "on_train_batch_end",
          "lr_scheduler_step", "validation_step")  # fmt: skip


@feature
def exceptions(make: Make, folder: Path) -> Any:
    results = []
    for place in PLACES:
        module = failing(place)
        saver = cb.OnExceptionCheckpoint(folder, place)
        settings = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
        run = make(callbacks=[saver], accumulate_grad_batches=2 if place == "on_after_backward" else 1, **settings)
        with pytest.raises(ArithmeticError, match="boom"):
            run.fit(module, loader(), loader())
        saved = torch.load(as_file(folder / f"{place}.ckpt"), weights_only=True)
        assert 1 <= saved["global_step"] <= 12
        kept = weights(module), list(saved["state_dict"].values()), saved["optimizer_states"]
        results.append((kept, train(make, module)))
    return results


@feature
def interrupt(make: Make, _: Path) -> Any:
    results, handler = [], signal.getsignal(signal.SIGINT)
    try:
        for place in ("on_train_batch_end", "forward"):
            module = failing(place, KeyboardInterrupt)
            with pytest.raises(SystemExit):
                make().fit(module, loader())
            results.append((weights(module), train(make, module)))
    finally:
        signal.signal(signal.SIGINT, handler)
    return results


# The optimizers


@feature
def accumulation_scheduler(make: Make, _: Path) -> Any:
    fit = train(make, callbacks=[cb.GradientAccumulationScheduler({0: 1, 1: 4})])
    assert fit["steps"] == 6 + 2
    return fit


@feature
def clip_by_hand(make: Make, _: Path) -> Any:
    class ByHand(Module):
        automatic_optimization = property(lambda _: False, lambda *_: None)

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            self.clip_gradients(optimizer, 0.02, ("norm", "value")[index % 2])
            optimizer.step()
            self.lr_schedulers().step()

    return train(make, ByHand("MlpInGroups"))


@feature
def configure_gradient_clipping(make: Make, _: Path) -> Any:
    class Late(Module):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            if self.trainer.global_step > 3:
                self.clip_gradients(optimizer, 0.05 / self.trainer.global_step, "norm")

    return train(make, Late("MlpInGroups"))


@feature
def optimizer_hooks_overridden(make: Make, _: Path) -> Any:
    class WarmUp(Module):
        seen: list[Any] = []

        def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * min(1.0, (self.trainer.global_step + 1) / 8)
            if self.trainer.global_step % 3 == 2:
                closure()
                optimizer.step()
            else:
                super().optimizer_step(epoch, index, optimizer, closure)

        def optimizer_zero_grad(self, epoch: int, index: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.seen.append(optimizer.param_groups[0]["lr"])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr, foreach=False)

    module = WarmUp()
    module.seen = []
    fit = train(make, module)
    assert len(set(module.seen)) == 8
    return fit, module.seen


@cache
def plain(run: Feature) -> Any:
    with TemporaryDirectory() as folder:
        return run(partial(trainer, "auto"), Path(folder))


def with_chunks(strategy: dict[str, Any]) -> Make:
    return lambda **settings: trainer(GeminiStrategy(**strategy), **settings)


def check(run: Feature, strategy: str, folder: Path) -> None:
    ours = run(with_chunks(STRATEGIES[strategy]), folder)
    assert_same(ours, plain(run), **({"rtol": 1e-4, "atol": 1e-6} if run.__name__ in ROUNDED else {}))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("run", FEATURES, ids=lambda run: run.__name__)
def test_one_rank_equals_plain_lightning(run: Feature, strategy: str, tmp_path: Path) -> None:
    check(run, strategy, tmp_path)
