"""GeminiStrategy under a real Trainer: the numbers of plain Lightning, and its features."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_gemini  # noqa: F401, registers the strategies
from lightning_gemini import GeminiStrategy
from lightning_gemini.core import Home, NonFiniteError
from tests import cases
from tests.lightning_cases import Module, as_file, loader, on_ranks, trainer
from tests.ranks import run_ranks

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

#: chunks kept, freed after use, and in host memory
STRATEGIES: dict[str, dict[str, Any]] = {
    "kept": {"placement": "device", "chunk_size": 2048},
    "host": {"placement": "host", "chunk_size": 2048},
}
MODELS = ["Mlp", "opt", "llama_checkpoint", "bert", "t5", "ConvNet", "FrozenBackbone", "TiedWeight", "BareRoot"]
SETTINGS: dict[str, dict[str, Any]] = {
    "simple": {},
    "accumulate": {"accumulate_grad_batches": 4},  # the last window of an epoch is partial
    "clip norm": {"gradient_clip_val": 0.1},
    "clip value": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
}


def fit(name: str, strategy: Any, **settings: Any) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    module = Module(name)
    run = trainer(GeminiStrategy(**strategy) if isinstance(strategy, dict) else strategy, **settings)
    run.fit(module, loader(name), loader(name))
    params = {key: value.detach().clone() for key, value in module.named_parameters()}
    return module.losses, params, {key: value.clone() for key, value in run.callback_metrics.items()}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(
    ("name", "settings"), [(n, "simple") for n in MODELS] + [("MlpInGroups", key) for key in SETTINGS]
)
def test_one_rank_equals_plain_lightning(name: str, settings: str, strategy: dict[str, Any]) -> None:
    losses, params, metrics = fit(name, "auto", **SETTINGS[settings])
    ours, values, logged = fit(name, strategy, **SETTINGS[settings])
    exact = settings != "clip norm"  # the norm is summed in another order
    assert ours == losses if exact else ours == pytest.approx(losses, rel=1e-6)
    for key, value in params.items():
        torch.testing.assert_close(values[key], value, **({"rtol": 0, "atol": 0} if exact else {}))
    torch.testing.assert_close(logged["val_loss"], metrics["val_loss"])


def _fit_all(jobs: list[tuple[str, str, str]]) -> dict:
    on_ranks()
    return {job: fit(job[0], STRATEGIES[job[2]], **SETTINGS[job[1]]) for job in jobs}


def test_two_ranks_equal_plain_lightning_on_the_same_global_batch() -> None:
    plain = [name for name in MODELS if name != "ConvNet"]  # a batch norm sees half of each batch
    jobs = [(n, "simple", s) for n in plain for s in STRATEGIES]
    jobs += [("MlpInGroups", key, s) for key in SETTINGS for s in STRATEGIES]
    first, second = run_ranks(_fit_all, 2, jobs)
    for job in jobs:
        name, settings, _ = job
        losses, params, metrics = fit(name, "auto", **SETTINGS[settings])
        averaged = [(a + b) / 2 for a, b in zip(first[job][0], second[job][0], strict=True)]
        assert averaged == pytest.approx(losses, rel=1e-4, abs=1e-6), job
        for key, value in params.items():
            torch.testing.assert_close(first[job][1][key], value, rtol=2e-3, atol=3e-4, msg=lambda m: f"{job} {m}")  # noqa: B023
            assert torch.equal(first[job][1][key], second[job][1][key])
        torch.testing.assert_close(first[job][2]["val_loss"], metrics["val_loss"], rtol=1e-4, atol=1e-6)


# How it is asked for


@pytest.mark.parametrize(
    ("name", "placement"), [("gemini", "auto"), ("gemini_device", "device"), ("gemini_host", "host")]
)
def test_names_are_registered(name: str, placement: str) -> None:
    strategy = trainer(name).strategy
    assert isinstance(strategy, GeminiStrategy)
    assert strategy._placement == placement


@pytest.mark.parametrize(("alias", "home"), [("cuda", Home.FULL), ("cpu", Home.HOST)])
def test_aliases_of_placements(alias: str, home: Home) -> None:
    homes = []

    class Look(L.Callback):
        def on_train_start(self, run: L.Trainer, module: L.LightningModule) -> None:
            homes.append({chunk.home for chunk in run.strategy.engine.store.chunks})

    trainer(GeminiStrategy(placement=alias), callbacks=[Look()], fast_dev_run=True).fit(Module(), loader())
    assert homes == [{home}]


def test_auto_takes_the_host_when_the_device_is_too_small() -> None:
    module = Module("opt")
    run = trainer(GeminiStrategy(device_memory="128KiB", chunk_size=2048), fast_dev_run=True)
    reports = []
    module.on_train_end = lambda: reports.append(run.strategy.memory_report())
    run.fit(module, loader("opt"))
    assert "with their shards in host memory" in reports[0]
    assert "of 128.00 KiB" in reports[0]


# The life of a model


class Deferred(Module):
    """Builds its model in ``configure_model``."""

    def __init__(self, name: str) -> None:
        L.LightningModule.__init__(self)
        self.name, self.lr, self.losses, self.model = name, 0.01, [], None

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(0)
            self.model = cases.CASES[self.name].build()


def test_configure_model() -> None:
    deferred, plain = Deferred("opt"), Module("opt")
    trainer().fit(deferred, loader("opt"))
    trainer("auto").fit(plain, loader("opt"))
    assert deferred.losses == plain.losses


def test_empty_init_is_initialised_in_setup() -> None:
    run = trainer()
    with run.init_module(empty_init=True):
        module = Module("opt")
    assert all(p.is_meta for p in module.parameters())
    run.fit(module, loader("opt"))
    assert module.losses[-1] < 4.7
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_validate_fit_test_predict_and_fit_again(strategy: dict[str, Any]) -> None:
    def run_all(make: Any) -> tuple[list[Any], Module]:
        module, results = Module("opt"), []
        for _ in range(2):
            run = trainer(make(), max_epochs=1)
            results.append(run.validate(module, loader("opt"), verbose=False))
            run.fit(module, loader("opt"), loader("opt"))
            results.append(run.test(module, loader("opt"), verbose=False))
            results.append([out.logits for out in run.predict(module, loader("opt"))])
        return results, module

    ours, module = run_all(lambda: GeminiStrategy(**strategy))
    theirs, plain = run_all(lambda: "auto")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for value, expected in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_inference_mode_as_under_nccl(strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On NCCL Lightning evaluates in inference mode, the sanity check included; gloo hides that."""
    from lightning.pytorch.loops import utilities

    monkeypatch.setattr(utilities, "_distributed_is_initialized", lambda: False)
    modes = []

    class Look(Module):
        def validation_step(self, batch: Any, index: int) -> None:
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            super().validation_step(batch, index)

    module = Look("opt")
    run = trainer(GeminiStrategy(**strategy), inference_mode=True)
    run.fit(module, loader("opt"), loader("opt"))
    assert set(modes) == {(False, False)}
    plain = Module("opt")
    trainer("auto").fit(plain, loader("opt"), loader("opt"))
    assert module.losses == plain.losses


class TwoOptimizers(Module):
    def __init__(self) -> None:
        super().__init__("Mlp")
        self.automatic_optimization = False
        self.head = nn.Linear(cases.WIDTH, cases.WIDTH)

    def training_step(self, batch: list[Tensor], index: int) -> None:
        body, head = self.optimizers()
        body.zero_grad()
        self.manual_backward(self.head(self.model(batch[0])).square().mean())
        self.clip_gradients(body, gradient_clip_val=0.5, gradient_clip_algorithm="value")
        body.step()
        head.zero_grad()
        loss = F.mse_loss(self.head(self.model(batch[0])), batch[0])
        self.manual_backward(loss)
        head.step()
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=False),
            torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9),
        )


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_manual_optimization_with_two_optimizers(strategy: dict[str, Any]) -> None:
    ours, theirs = TwoOptimizers(), TwoOptimizers()
    trainer(GeminiStrategy(**strategy)).fit(ours, loader())
    trainer("auto").fit(theirs, loader())
    assert ours.losses == theirs.losses


def test_an_exception_leaves_an_ordinary_model() -> None:
    class Fails(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            if len(self.losses) == 3:
                raise ValueError("boom")
            return super().training_step(batch, index)

    module, plain = Fails("opt"), Module("opt")
    with pytest.raises(ValueError, match="boom"):
        trainer("gemini_host").fit(module, loader("opt"))
    trainer("auto", max_steps=3).fit(plain, loader("opt"))
    for value, expected in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, expected)
    trainer("gemini_host").fit(plain, loader("opt"))  # and the process goes on


class LogsNorms(Module):
    def __init__(self) -> None:
        super().__init__("Unused")
        self.norms: list[float] = []

    def on_after_backward(self) -> None:
        if isinstance(self.trainer.strategy, GeminiStrategy):
            self.norms.append(self.trainer.strategy.grad_norm().item())
        else:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.norms.append(torch.nn.utils.get_total_norm(grads).item())


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_norms_are_there_when_lightning_says_that_backward_is_over(strategy: dict[str, Any]) -> None:
    ours, theirs = LogsNorms(), LogsNorms()
    trainer(GeminiStrategy(**strategy), accumulate_grad_batches=2).fit(ours, loader("Unused"))
    trainer("auto", accumulate_grad_batches=2).fit(theirs, loader("Unused"))
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-5)


class ReadsLate(Module):
    """From the third batch on, a weight from a list, in a way that autograd does not save."""

    def __init__(self) -> None:
        super().__init__("Mlp")
        self.kept = [self.model.layers[0][0].weight]

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss = super().loss(batch)
        return loss + self.kept[0].sum() if len(self.losses) >= 2 else loss


def test_a_hidden_read_in_a_later_step_fails_the_run_or_is_served() -> None:
    module = ReadsLate()
    with pytest.raises(NonFiniteError, match="check=True"):
        trainer(GeminiStrategy("host", chunk_size=1088)).fit(module, loader())
    assert all(p.isfinite().all() for p in module.parameters())
    ours, theirs, found = ReadsLate(), ReadsLate(), []
    run = trainer(GeminiStrategy("host", chunk_size=1088, check=True))
    ours.on_train_end = lambda: found.extend(run.strategy.engine.hidden_reads)
    run.fit(ours, loader())
    trainer("auto").fit(theirs, loader())
    assert ours.losses == theirs.losses
    assert found == ["model.layers.0.0.weight"]


class DropsByHand(Module):
    """Manual optimization: a backward whose gradients are dropped through Lightning's wrapper."""

    def __init__(self) -> None:
        super().__init__("Mlp")
        self.automatic_optimization = False
        self.norms: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(1e3 * self.loss(batch))
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        ours = isinstance(self.trainer.strategy, GeminiStrategy)
        with self.trainer.strategy.summon_full_params(with_grads=True) if ours else nullcontext():
            self.norms.append(sum(p.grad.square().sum().item() for p in self.parameters()))
        optimizer.step()
        self.losses.append(loss.item())


def test_gradients_dropped_through_lightnings_wrapper_and_whole_ones() -> None:
    ours, theirs = DropsByHand(), DropsByHand()
    trainer(GeminiStrategy("device")).fit(ours, loader())
    trainer("auto").fit(theirs, loader())
    assert ours.losses == theirs.losses
    assert ours.norms == pytest.approx(theirs.norms)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_precision_modes(precision: str) -> None:
    module = Module("opt")
    run = trainer(precision=precision, max_epochs=4)
    assert run.precision == precision
    assert type(run.precision_plugin).__name__ == "GeminiPrecision"
    seen = []
    module.on_train_batch_start = lambda *_: seen.append({p.dtype for p in module.parameters()})
    run.fit(module, loader("opt"))
    assert seen[0] == {torch.float32 if precision == "32-true" else torch.bfloat16}
    assert sum(module.losses[-4:]) < sum(module.losses[:4])


# Checkpoints


def epochs(strategy: Any, folder: Path | None, number: int, resume: Path | None = None) -> Module:
    module = Module("opt")
    saver = [ModelCheckpoint(folder, save_last=True)] if folder else []
    run = trainer(strategy, max_epochs=number, callbacks=saver, enable_checkpointing=bool(folder))
    run.fit(module, loader("opt"), ckpt_path=as_file(resume) if resume and strategy == "auto" else resume)
    return module


@pytest.mark.parametrize("first", ["auto", "gemini", "gemini_host", "full"])
@pytest.mark.parametrize("then", ["auto", "gemini", "gemini_host"])
def test_checkpoints_are_read_by_all(first: str, then: str, tmp_path: Path) -> None:
    straight = epochs("auto", None, 2)
    epochs(GeminiStrategy(state_dict_type="full") if first == "full" else first, tmp_path, 1)
    assert (tmp_path / "last.ckpt").is_dir() == first.startswith("gemini")
    module = epochs(then, None, 2, tmp_path / "last.ckpt")
    assert module.losses == straight.losses[6:]
    for value, expected in zip(module.parameters(), straight.parameters(), strict=True):
        assert torch.equal(value, expected)


def _resume_on_ranks(folder: Path) -> tuple[list[float], list[float], dict[str, Tensor]]:
    on_ranks()
    first = epochs("gemini", folder, 1)
    second = epochs("gemini_host", None, 2, folder / "last.ckpt")
    straight = epochs("gemini", None, 2)
    assert first.losses + second.losses == straight.losses
    for value, expected in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(value, expected)
    return first.losses, second.losses, {key: p.detach() for key, p in second.named_parameters()}


def test_checkpoints_on_two_ranks_and_back_to_one(tmp_path: Path) -> None:
    (_, _, first), (_, _, second) = run_ranks(_resume_on_ranks, 2, tmp_path)
    assert all(torch.equal(first[key], second[key]) for key in first)
    module = epochs("auto", None, 2, tmp_path / "last.ckpt")  # plain Lightning goes on with it
    for key, value in module.named_parameters():
        torch.testing.assert_close(value.detach(), first[key], rtol=2e-3, atol=3e-4)


def test_a_checkpoint_fills_a_model_on_meta(tmp_path: Path) -> None:
    straight = epochs("auto", None, 2)
    epochs("gemini", tmp_path, 1)
    run = trainer()
    with run.init_module(empty_init=True):
        module = Module("opt")
    run.fit(module, loader("opt"), ckpt_path=tmp_path / "last.ckpt")
    assert module.losses == straight.losses[6:]


def test_mixed_precision_checkpoints_hold_the_masters(tmp_path: Path) -> None:
    module = Module("opt")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(precision="bf16-mixed", max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    run.fit(module, loader("opt"))
    saved = torch.load(as_file(tmp_path / "last.ckpt"), weights_only=True)["state_dict"]
    for key, value in module.named_parameters():
        assert saved[key].dtype == torch.float32
        assert torch.equal(saved[key], value)
        if value.numel() > 100:
            assert not torch.equal(value, value.bfloat16().float())
