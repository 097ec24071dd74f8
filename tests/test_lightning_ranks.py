"""More of Lightning's features, and all of them on two ranks: what they give is what one plain process gives."""

from __future__ import annotations

import csv
import traceback
from functools import cache
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.regression import MeanSquaredError

from lightning_gemini import GeminiStrategy
from tests import cases
from tests.lightning_cases import Module, as_file, dataset, loader, on_ranks, trainer
from tests.ranks import run_ranks
from tests.resuming import CountedBatches
from tests.test_lightning_features import FEATURES, Feature, Make, assert_same, check, facts, plain, train, weights
from tests.test_strategy import STRATEGIES

MORE: list[Feature] = []


def feature(function: Feature) -> Feature:
    MORE.append(function)
    return function


@feature
def two_optimizers_that_toggle(make: Make, _: Path) -> Any:
    class Gan(Module):
        automatic_optimization = property(lambda _: False, lambda *_: None)

        def __init__(self) -> None:
            super().__init__()
            self.critic = nn.Sequential(nn.Linear(cases.WIDTH, 8), nn.ReLU(), nn.Linear(8, 1))

        def training_step(self, batch: list[Tensor], index: int) -> None:
            real, (g, d) = batch[0], self.optimizers()
            self.toggle_optimizer(g)
            assert not any(p.requires_grad for p in self.critic.parameters())
            fooled = F.softplus(-self.critic(self.model(real.flip(0)))).mean()
            g.zero_grad()
            self.manual_backward(fooled)
            g.step()
            self.untoggle_optimizer(g)
            with d.toggle_model(sync_grad=index % 3 == 2):  # accumulates over three batches
                caught = F.softplus(self.critic(self.model(real.flip(0)).detach())).mean()
                self.manual_backward(caught + F.softplus(-self.critic(real)).mean())
                if index % 3 == 2:
                    d.step()
                    d.zero_grad()
            assert all(p.requires_grad for p in self.parameters())
            self.losses += [fooled.item(), caught.item()]

        def configure_optimizers(self) -> Any:
            adam = torch.optim.Adam(self.model.parameters(), 0.01, foreach=False)
            return adam, torch.optim.SGD(self.critic.parameters(), 0.3, 0.9)

    return train(make, Gan())


@feature
def closures(make: Make, _: Path) -> Any:
    class Closure(Module):
        automatic_optimization = property(lambda _: False, lambda *_: None)

        def training_step(self, batch: Any, index: int) -> None:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = super(Closure, self).training_step(batch, index)
                self.manual_backward(loss)
                return loss

            optimizer = self.optimizers()
            self.log("returned", optimizer.step(closure))

    return train(make, Closure())


@feature
def returning_none(make: Make, _: Path) -> Any:
    class Skips(Module):
        def training_step(self, batch: Any, index: int) -> Tensor | None:
            loss = super().training_step(batch, index)
            return None if index in (0, 3) else loss

    return train(make, Skips()), train(make, Skips(), accumulate_grad_batches=2)


class Plateau(Module):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class OneCycle(Module):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), foreach=False)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


@feature
def learning_rate_schedulers(make: Make, folder: Path) -> Any:
    results = []
    for kind in (Plateau, OneCycle):
        monitor, module = cb.LearningRateMonitor("epoch", log_momentum=True), kind()
        seen: list[float] = []
        module.on_train_batch_end = lambda *_, m=module, s=seen: s.append(m.optimizers().param_groups[0]["lr"])
        results.append(train(make, module, callbacks=[monitor], logger=CSVLogger(folder), max_epochs=4))
        assert len(set(seen)) > 1
        results.append((seen, monitor.lrs))
    return results


@feature
def a_loss_over_all_ranks(make: Make, _: Path) -> Any:
    class Contrast(Module):
        def loss(self, batch: list[Tensor]) -> Tensor:
            out = F.normalize(self.all_gather(self.model(batch[0]), sync_grads=True).view(-1, cases.WIDTH))
            return (out @ out.T).logsumexp(1).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=5.0)

    return train(make, Contrast())


@feature
def torchmetrics(make: Make, folder: Path) -> Any:
    class Metrics(Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()
            self.several = MetricCollection({"mse": MeanSquaredError(), "rmse": MeanSquaredError(squared=False)})

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = super().training_step(batch, index)
            self.mean(loss.detach(), weight=len(batch[0]))
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.several.update(self.model(batch[0]), batch[0])
            self.log_dict(self.several)
            super().validation_step(batch, index)

    module = Metrics()
    assert len(list(module.parameters())) == len(list(module.model.parameters()))
    fit = train(make, module)
    assert 0 < fit["metrics"]["mean"] < sum(module.losses) / len(module.losses)  # the second epoch alone
    return fit


@feature
def monitors_bars_and_a_log(make: Make, folder: Path) -> Any:
    monitors = [cb.LearningRateMonitor("step"), cb.DeviceStatsMonitor(cpu_stats=True), cb.RichModelSummary()]
    results = []
    for bar in (cb.RichProgressBar(), cb.TQDMProgressBar()):
        logger = CSVLogger(folder, type(bar).__name__, version=0)
        settings = {"enable_progress_bar": True, "enable_model_summary": True, "log_every_n_steps": 1}
        results.append(train(make, callbacks=[*monitors, bar], logger=logger, **settings))
        if dist.is_initialized():
            dist.barrier()
        rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
        assert any(key.startswith("DeviceStatsMonitor.on_train_batch_end/cpu") for key in rows[0])
        results.append([float(row[key] or 0) for row in rows for key in ("lr-AdamW", "val_loss")])
    return results


@feature
def model_summary(make: Make, _: Path) -> Any:
    seen: list[Any] = []

    class Look(cb.ModelSummary):
        @staticmethod
        def summarize(data: Any, total: int, trainable: int, size: float, modes: Any, *rest: Any, **more: Any) -> None:
            seen.append([total, trainable, size, *rest, *(str(value) for _, column in data for value in column)])

    for name in ("Mlp", "FrozenBackbone", "TiedWeight"):
        module = Module(name)
        module.forward = module.model.forward
        module.example_input_array = torch.full((2, 12), 3) if name == "TiedWeight" else torch.ones(2, cases.WIDTH)
        train(make, module, loader(name), callbacks=[Look(max_depth=-1)], max_epochs=1, limit_val_batches=0)
    seen = make().strategy.broadcast(seen)  # rank 0 summarises
    assert all(total >= trainable > 0 for total, trainable, *_ in seen)
    return seen


@feature
def profilers(make: Make, folder: Path) -> Any:
    results = []
    for kind in (SimpleProfiler, AdvancedProfiler, PyTorchProfiler):
        profiler = kind(dirpath=folder, filename=kind.__name__)
        results.append(train(make, profiler=profiler, max_epochs=1, limit_val_batches=0))
        (file,) = folder.glob(f"fit-{kind.__name__}*.txt")
        assert ".training" in file.read_text()
    return results


@feature
def detect_anomaly_and_deterministic(make: Make, _: Path) -> Any:
    try:
        return train(make, detect_anomaly=True), train(make, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)


@feature
def model_checkpoint(make: Make, folder: Path) -> Any:
    best = cb.ModelCheckpoint(folder, "{epoch}-{step}", monitor="val_loss", save_top_k=2)
    steps = cb.ModelCheckpoint(folder, "at-{step}", every_n_train_steps=4, save_top_k=-1, save_last="link")
    # looks after its position itself, as plain Lightning needs it
    data = CountedBatches(loader(), shuffle=False)
    fit = train(make, Module(lr=0.02), data, callbacks=[best, steps], enable_checkpointing=True, max_epochs=4)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2 + 6 + 1
    plainly = Module.load_from_checkpoint(as_file(best.best_model_path))
    run, resumed, path = make(max_epochs=2), Module(), folder / "at-step=8.ckpt"
    run.fit(resumed, CountedBatches(loader(), shuffle=False), loader(), ckpt_path=path)
    evaluated = [run.validate(Module(), loader(), ckpt_path=path, verbose=False),
                 run.test(Module(), loader(), ckpt_path=best.best_model_path, verbose=False),
                 run.predict(Module(), loader(), ckpt_path=path)[0].square().mean()]  # fmt: skip
    assert len(resumed.losses) == 4
    return fit, best.best_model_score, names, weights(plainly), facts(run, resumed), evaluated


class Saved(Module):
    def __init__(self, name: str, lr: float, note: str = "none") -> None:
        super().__init__(name, lr)
        self.save_hyperparameters()
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if "backbone" not in key}
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint["mine"]


@feature
def hyperparameters_and_edited_checkpoints(make: Make, folder: Path) -> Any:
    saver, module = cb.ModelCheckpoint(folder, "edited"), Saved("FrozenBackbone", lr=0.02, note="kept")
    run, path = make(callbacks=[saver], enable_checkpointing=True, max_epochs=1), folder / "edited.ckpt"
    run.fit(module, loader("FrozenBackbone"))
    loaded = Saved.load_from_checkpoint(as_file(path))
    assert (loaded.mine, loaded.hparams.note, loaded.lr) == (7, "kept", 0.02)
    assert not any("backbone" in key for key in torch.load(as_file(path), weights_only=False)["state_dict"])
    resumed, run = Saved("FrozenBackbone", lr=0.02), make(max_epochs=2)
    run.fit(resumed, loader("FrozenBackbone"), ckpt_path=path)
    assert resumed.mine == 7
    return weights(loaded.model.head), facts(run, resumed)


@feature
def lr_find(make: Make, folder: Path) -> Any:
    everything = DataLoader(dataset(), 4)  # on each rank, as rank 0's losses decide
    module, run = Module(), make(default_root_dir=folder, max_epochs=5)
    before = weights(module)
    found = Tuner(run).lr_find(module, everything, num_training=24, early_stop_threshold=None)
    assert_same(weights(module), before)
    assert module.lr == found.suggestion() != 0.01
    module.losses.clear()
    run.fit(module, everything)
    called, finder = Module(), cb.LearningRateFinder(num_training_steps=24)
    fit = train(make, called, everything, callbacks=[finder], default_root_dir=folder, max_epochs=5)
    assert called.lr == finder.optimal_lr.suggestion() != 0.01
    return found.results, module.lr, facts(run, module), called.lr, fit


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("run", MORE, ids=lambda run: run.__name__)
def test_one_rank_equals_plain_lightning(run: Feature, strategy: str, tmp_path: Path) -> None:
    check(run, strategy, tmp_path)


def test_counts_of_a_model_on_meta() -> None:
    run, counts = trainer(GeminiStrategy(), callbacks=[cb.ModelSummary()], fast_dev_run=True), []
    with run.init_module(empty_init=True):
        module = Module("opt")
    assert all(p.is_meta for p in module.parameters())
    run.callbacks[0].summarize = lambda data, total, trainable, size, *_, **__: counts.append((total, trainable, size))
    run.fit(module, loader("opt"))
    total = sum(p.numel() for p in Module("opt").parameters())
    assert counts == [(total, total, pytest.approx(total * 4 / 1e6))]


def test_batch_sizes_are_not_tuned_with_a_distributed_strategy() -> None:
    with pytest.raises(ValueError, match="batch size is currently not supported with distributed strategies"):
        Tuner(trainer()).scale_batch_size(Module(), loader())


def test_the_strategy_is_at_hand() -> None:
    class Asks(Module):
        def on_train_start(self) -> None:
            strategy = self.trainer.strategy
            assert isinstance(strategy, GeminiStrategy)
            assert strategy.model is strategy.lightning_module is self
            assert str(self.device) == str(strategy.root_device) == "cpu"

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log("norm", self.trainer.strategy.grad_norm())

    run = trainer(GeminiStrategy())
    run.fit(Asks(), loader())
    assert run.callback_metrics["norm"] > 0


#: a rank alone reads its files, is refused by Lightning (None), or is left with pieces of the weights
ALONE = {"profilers", "returning_none", "exceptions", "interrupt"}
ON_RANKS = {run.__name__: run for run in (*FEATURES, *MORE) if run.__name__ not in ALONE}


def _run(name: str, strategy: str, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    try:
        return ON_RANKS[name](lambda **settings: trainer(GeminiStrategy(**STRATEGIES[strategy]), **settings), folder)
    except Exception:
        return traceback.format_exc()


def _run_all(folder: Path) -> dict[str, Any]:
    on_ranks()
    return {name: _run(name, strategy, folder / name) for name, strategy in zip(ON_RANKS, cycle(STRATEGIES))}


@cache
def _on_two_ranks() -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        return run_ranks(_run_all, 2, Path(folder))


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks_equal_plain_lightning_on_the_same_global_batch(name: str) -> None:
    first, second = (results[name] for results in _on_two_ranks())
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    assert_same([_mean(*pair) for pair in pairs], plain(ON_RANKS[name]), rtol=2e-3, atol=3e-4)


def _mean(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor | float):
        return (first + second) / 2
    assert first == second
    return first


class Rows(Module):
    def loss(self, batch: list[Tensor]) -> Tensor:
        key = f"{self.trainer.state.stage.value} {self.trainer.current_epoch}"
        self.seen.setdefault(key, []).extend(batch[1].tolist())
        loss = super().loss(batch)
        rank = torch.tensor(float(self.global_rank + 1))
        for reduce in ("mean", "sum"):
            self.log(f"{key[0]} {reduce}", rank, sync_dist=True, reduce_fx=reduce, on_epoch=True, on_step=False)
        self.log(f"{key[0]} mine", rank)
        return loss


def _injected() -> tuple[dict[str, list[int]], dict[str, float]]:
    on_ranks()
    (rows,) = dataset().tensors
    data = TensorDataset(rows, torch.arange(len(rows)))
    module, run = Rows(), trainer(GeminiStrategy(), use_distributed_sampler=True, num_sanity_val_steps=0)
    module.seen = {}
    assert run.strategy.is_distributed
    run.fit(module, DataLoader(data, 2, shuffle=True), DataLoader(data, 2))
    for epoch in range(2):
        sampler = DistributedSampler(data, shuffle=True)
        sampler.set_epoch(epoch)
        assert module.seen[f"train {epoch}"] == list(sampler)
    return module.seen, {key: value.item() for key, value in run.callback_metrics.items()}


def test_each_rank_is_given_its_half_and_logs_are_reduced() -> None:
    (first, logged), (second, others) = run_ranks(_injected, 2)
    for stage in ("train 0", "train 1", "validate 0"):
        assert len(first[stage]) == len(second[stage]) == 11
        assert sorted(first[stage] + second[stage]) == list(range(22))
    assert first["train 0"] != first["train 1"]
    assert first["validate 0"] == list(range(0, 22, 2))
    for stage in "tv":
        assert [logged[f"{stage} {kind}"] for kind in ("mean", "mine")] == [1.5, 1]
        assert [others[f"{stage} {kind}"] for kind in ("mean", "mine")] == [1.5, 2]
        assert logged[f"{stage} sum"] == others[f"{stage} sum"] == 3 * 6
