"""Precision modes under a Trainer."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gemini import GeminiStrategy
from lightning_gemini.core import ConfigurationError, NonFiniteError
from lightning_gemini.optim import Lion
from lightning_gemini.precision import GeminiPrecision
from tests import cases
from tests.lightning_cases import Module, as_file, loader, on_ranks, trainer
from tests.ranks import run_ranks
from tests.test_mixed import assert_same_bits

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

MODES = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
DTYPES = dict(zip(MODES, (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16), strict=True))


def make(precision: str = "32-true", placement: str = "device", settings: Any = None, **trainer_settings: Any) -> Any:
    plugin = GeminiPrecision(precision, **(settings or {}))
    strategy = GeminiStrategy(placement, chunk_size=2048, precision_plugin=plugin)
    return trainer(strategy, **trainer_settings)


def scaled(mode: str) -> dict[str, float]:
    """A loss scale that does not overflow at once, where there is one."""
    return {"initial_scale": 2.0**10} if mode == "16-mixed" else {}


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


# What was asked for


@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_says_which_precision_it_is(mode: str) -> None:
    plugin = GeminiPrecision(mode)
    made = [
        trainer(GeminiStrategy(precision_plugin=plugin)),
        trainer("gemini", plugins=plugin),
        trainer(GeminiStrategy(precision_plugin=plugin), precision=mode if mode != "16-mixed" else "32-true"),
    ]
    if mode != "16-mixed":  # on the CPU Lightning makes bf16-mixed of a flag
        made.append(trainer("gemini", precision=mode))
    for run in made:
        assert run.precision == mode
        assert isinstance(run.precision_plugin, GeminiPrecision)
        assert run.precision_plugin is run.strategy.precision_plugin
        assert run.precision_plugin.policy == plugin.policy
        assert (run.precision_plugin.loss_scale is not None) == (mode == "16-mixed")
    assert all(run.precision_plugin is plugin for run in made[:3])
    assert plugin.policy.reduce == (torch.float32 if mode.endswith("mixed") else None)
    assert plugin.policy.compute == (None if mode == "32-true" else DTYPES[mode])


def test_contradicting_precisions_are_refused() -> None:
    plugin = GeminiPrecision("bf16-mixed")
    for fit in (True, False):
        run = trainer(GeminiStrategy(precision_plugin=plugin), precision="bf16-true")
        with pytest.raises(ConfigurationError, match=r"precision='bf16-true'\) and a .* for 'bf16-mixed'"):
            (run.fit if fit else run.test)(Module(), loader())
    with pytest.raises(MisconfigurationException, match="choose one"):
        trainer(GeminiStrategy(precision_plugin=plugin), plugins=GeminiPrecision("bf16-true"))
    with pytest.raises(ValueError, match="Choose one"):
        trainer("gemini", plugins=plugin, precision="bf16-true")
    for flag in ("64-true", "16-true"):
        with pytest.raises(ConfigurationError, match=rf"supports precision='32-true' or .* got '{flag}'"):
            trainer("gemini", precision=flag)


BAD: list[dict[str, Any]] = [
    {"precision": "fp8"},
    {"precision": None},
    {"master_weights": "split"},
    {"precision": "bf16-true", "master_weights": "fp32"},
    {"precision": "16-mixed", "master_weights": "split"},
    {"precision": "bf16-mixed", "master_weights": "bf16"},
    {"reduce_dtype": "fp64"},
    {"reduce_dtype": torch.float32},
    {"state_dtype": "fp16"},
    {"state_dtype": "int8"},
    {"nonfinite": "ignore"},
    {"autocast": True},
    *({"precision": "16-mixed", "initial_scale": value} for value in (0.0, -1.0, 0.5, math.inf, math.nan)),
    *({"precision": "16-mixed", "minimum_scale": value} for value in (0.0, -1.0, math.inf, math.nan)),
    {"precision": "16-mixed", "growth_factor": 1.0},
    {"precision": "16-mixed", "backoff_factor": 1.0},
    {"precision": "16-mixed", "backoff_factor": 0.0},
    {"precision": "16-mixed", "growth_interval": 0},
    {"precision": "16-mixed", "growth_interval": 2.5},
    *({"precision": "16-mixed", "initial_scale": value} for value in ("a", True, 1e39)),
    {"precision": "bf16-mixed", "initial_scale": 1024.0},
    {"precision": ["bf16-mixed"]},
    {"reduce_dtype": []},
    {"precision": "bf16-mixed", "autocast": "yes"},
    {"buffer_dtype": "fp8"},
]


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        GeminiPrecision(**settings)


@pytest.mark.parametrize("settings", [{"precision": "16-mixed"}, {"precision": "bf16-mixed", "nonfinite": "skip"}])
def test_updates_in_backward_cannot_skip(settings: dict[str, Any]) -> None:
    run = trainer(GeminiStrategy(update="in_backward", precision_plugin=GeminiPrecision(**settings)))
    module = Module()
    with pytest.raises(ConfigurationError, match="update='in_backward' cannot work with"):
        run.fit(module, loader())
    assert not module.losses


# What is computed


class Watched(Module):
    """Notes the dtypes that it sees, and the norms of its gradients."""

    def __init__(self, name: str = "Mlp", lr: float = 0.01) -> None:
        super().__init__(name, lr)
        self.seen: set[Any] = set()
        self.norms: list[float] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        self.seen |= {batch[0].dtype, next(self.model.parameters()).dtype}
        return super().loss(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(self.trainer.strategy.grad_norm().item())


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_cast_once_and_norms_are_unscaled(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[Any] = []
    convert = GeminiPrecision.convert_input

    def count(self: GeminiPrecision, data: Any) -> Any:
        batches.append(data)
        return convert(self, data)

    monkeypatch.setattr(GeminiPrecision, "convert_input", count)
    plain, module = Watched(), Watched()
    make().fit(plain, loader())
    batches.clear()
    run = make(mode, settings=scaled(mode), gradient_clip_val=0.05, max_epochs=1)
    run.fit(module, loader())
    assert module.seen == {DTYPES[mode]}
    assert len(batches) == len(module.losses) == 6
    # once for the batch, which a second time would leave as it is
    assert {batch[0].dtype for batch in batches} == {torch.float32}
    assert module.norms[0] == pytest.approx(plain.norms[0], rel=0.02)
    integers = run.precision_plugin.convert_input({"ids": torch.ones(2, dtype=torch.long), "text": "x"})
    assert integers["ids"].dtype == torch.long


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_autocast_gives_losses_in_fp32(mode: str) -> None:
    seen: dict[bool, list[torch.dtype]] = {True: [], False: []}

    class Classifier(L.LightningModule):
        def __init__(self, autocast: bool) -> None:
            super().__init__()
            self.layer, self.autocast = nn.Linear(cases.WIDTH, 5), autocast

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            logits = self.layer(batch[0])
            loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
            seen[self.autocast] += [logits.dtype, loss.dtype]
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    for autocast in (True, False):
        module = Classifier(autocast)
        before = weights(module)
        settings = {"autocast": autocast, **scaled(mode)}
        make(mode, settings=settings, limit_train_batches=2, max_epochs=1).fit(module, loader())
        assert not torch.equal(weights(module)[0], before[0])
    assert seen[True] == [DTYPES[mode], torch.float32] * 2
    assert seen[False] == [DTYPES[mode]] * 4


@pytest.mark.parametrize("placement", ["device", "host"])
def test_kinds_of_masters_are_the_same_run(placement: str) -> None:
    results = []
    for settings in ({}, {"master_weights": "fp32"}):
        module = Module()
        run = make("bf16-mixed", placement, settings, accumulate_grad_batches=2, gradient_clip_val=0.1)
        run.fit(module, loader(), loader())
        results.append([weights(module), module.losses, float(run.callback_metrics["val_loss"])])
    assert_same_bits(*results)


class Loaded(Module):
    """In bf16, as large models are published."""

    def __init__(self, lr: float = 1e-5) -> None:
        super().__init__(lr=lr)
        self.to(torch.bfloat16)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)


def test_a_model_loaded_in_bf16_moves_at_a_small_learning_rate() -> None:
    moved = {}
    for mode in ("bf16-mixed", "bf16-true"):
        module = Loaded()
        before, masters = weights(module), []
        module.on_train_end = lambda m=module, s=masters: s.extend(m.trainer.strategy.engine.store.masters)
        make(mode, max_epochs=12).fit(module, loader())
        assert len(masters) > 1 if mode == "bf16-mixed" else not masters
        assert all(p.dtype == torch.bfloat16 for p in module.parameters()), "it is what it was"
        large = [(a, b) for a, b in zip(weights(module), before, strict=True) if b.dim() == 2]
        moved[mode] = sum((a != b).sum().item() for a, b in large) / sum(b.numel() for _, b in large)
    assert moved["bf16-mixed"] > 0.5
    assert moved["bf16-true"] < 0.5 * moved["bf16-mixed"]


def test_a_model_loaded_in_bf16_resumes_with_its_masters(tmp_path: Path) -> None:
    whole, half, rest = Loaded(), Loaded(), Loaded()
    make("bf16-mixed", max_epochs=4).fit(whole, loader())
    half.on_train_end = lambda: half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    make("bf16-mixed", max_epochs=2).fit(half, loader())
    make("bf16-mixed", max_epochs=4).fit(rest, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_bits(weights(rest), weights(whole))


@pytest.mark.parametrize("name", ["Lion", "SGD", "Adagrad", "NAdam"])
def test_other_optimizers_train_in_mixed_precision(name: str) -> None:
    class Other(Module):
        def configure_optimizers(self) -> Any:
            p = self.parameters()
            return {
                "Lion": lambda: Lion(p, lr=1e-3),
                "SGD": lambda: torch.optim.SGD(p, lr=0.05, momentum=0.9),
                "Adagrad": lambda: torch.optim.Adagrad(p, lr=0.01),
                "NAdam": lambda: torch.optim.NAdam(p, lr=0.01),
            }[name]()

    sums = {}
    for mode in ("32-true", "bf16-mixed", "16-mixed"):
        module = Other()
        make(mode, settings=scaled(mode), max_epochs=4).fit(module, loader())
        assert all(p.dtype == torch.float32 for p in module.parameters())
        sums[mode] = sum(module.losses)
        assert sum(module.losses[-6:]) < 0.9 * sum(module.losses[:6])
    assert sums["bf16-mixed"] == pytest.approx(sums["32-true"], rel=0.02)
    assert sums["16-mixed"] == pytest.approx(sums["32-true"], rel=0.005)


# The loss scale, and what is not finite


def test_the_loss_scale_is_saved_and_restored(tmp_path: Path) -> None:
    settings = {"initial_scale": 2.0**36, "growth_interval": 7}

    class Saves(Module):
        def on_train_batch_end(self, *_: Any) -> None:
            scales.append(self.trainer.precision_plugin.loss_scale.value)
            if self.trainer.global_step == 18:  # in the middle of an interval, at the end of an epoch
                self.trainer.save_checkpoint(tmp_path / "at.ckpt")

    scales: list[float] = []
    whole = Saves()
    make("16-mixed", settings=settings, max_epochs=5).fit(whole, loader())
    assert max(scales) == 2.0**35, "the first step overflows"
    saved = torch.load(as_file(tmp_path / "at.ckpt"), weights_only=True)["GeminiPrecision"]
    assert saved["scale"] == scales[17]
    assert saved["_growth_tracker"] > 0
    expected, scales = scales[18:], []
    assert len(set(expected)) > 1, "the scale changes after the checkpoint"
    rest = Module()
    rest.on_train_batch_end = lambda *_: scales.append(rest.trainer.precision_plugin.loss_scale.value)
    run = make("16-mixed", settings={"growth_interval": 1}, max_epochs=5)
    run.fit(rest, loader(), ckpt_path=tmp_path / "at.ckpt")
    assert scales == expected
    assert_same_bits(weights(rest), weights(whole))


class Breaks(Module):
    """The loss of one rank's third batch is infinite."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        return loss * float("inf") if index == 2 and last and self.trainer.current_epoch == 0 else loss


def non_finite() -> None:
    on_ranks() if dist.is_initialized() else None
    module, scales = Breaks(), []
    module.on_train_batch_end = lambda *_: scales.append(module.trainer.precision_plugin.loss_scale.value)
    run = make("16-mixed", settings={"initial_scale": 2.0**10})
    run.fit(module, loader())
    assert scales[:4] == [2.0**10] * 2 + [2.0**9] * 2
    assert run.global_step == 12
    skips = Breaks()
    with pytest.warns(UserWarning, match=r"gradient of model\.layers\.0\S* is not finite: the step is skipped"):
        make("bf16-mixed", settings={"nonfinite": "skip"}).fit(skips, loader())
    for one in (module, skips):
        assert all(p.isfinite().all() for p in one.parameters())
        assert len(one.losses) == 12
    raises = Breaks()
    with pytest.raises(NonFiniteError, match=r"gradient of model\.layers\.0\S* is not finite \(the first"):
        make("bf16-mixed").fit(raises, loader())
    assert len(raises.losses) == 3


def test_what_is_not_finite_under_a_trainer() -> None:
    non_finite()


def test_what_is_not_finite_under_a_trainer_on_two_ranks() -> None:
    run_ranks(non_finite, 2)


class Default(Module):
    """AdamW as most people write it, which a rule runs."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_the_default_adamw_is_plain_lightnings_to_rounding(placement: str) -> None:
    settings = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    plain, ours = Default(), Default()
    trainer("auto", **settings).fit(plain, loader())
    make(placement=placement, **settings).fit(ours, loader())
    for value, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        # a thousandth of a step: where a gradient is next to nothing, Adam makes much of its last bit
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


class Buffered(Module):
    """A buffer of its own that meets a Linear, beside a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(cases.WIDTH))
        self.norm = nn.BatchNorm1d(cases.WIDTH)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = self.norm(batch[0].flatten(0, -2)) * 0 + self.shift
        return self.model(x).float().square().mean()


def test_buffers_are_cast_if_asked_for_and_an_error_says_so() -> None:
    with pytest.raises(RuntimeError, match="dtype") as caught:
        make("bf16-mixed", max_epochs=1).fit(Buffered(), loader())
    assert any("GeminiPrecision(buffer_dtype=...) casts buffers once" in note for note in caught.value.__notes__)
    for settings in ({"buffer_dtype": "bf16"}, {"autocast": True}):
        module = Buffered()
        make("bf16-mixed", settings=settings, max_epochs=1).fit(module, loader())
        assert module.norm.running_mean is not None
        assert module.norm.running_mean.dtype == torch.float32
        assert module.shift.dtype == (torch.bfloat16 if "buffer_dtype" in settings else torch.float32)


def test_the_plugin_is_for_this_strategy() -> None:
    with pytest.raises(ConfigurationError, match="works with the gemini strategy, not with SingleDeviceStrategy"):
        trainer("auto", plugins=GeminiPrecision("bf16-mixed")).fit(Module(), loader())
