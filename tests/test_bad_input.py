"""What cannot work is refused before training, in words: what was expected, what came, what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, Precision
from torch import Tensor, nn

from lightning_gemini import GeminiPrecision, GeminiStrategy
from lightning_gemini.core import ConfigurationError, OutOfBudgetError, StateError, shard
from tests import cases
from tests.lightning_cases import Module, loader, trainer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "gpu"}, r"placement must be one of auto, device, cuda, host, cpu, got 'gpu'"),
        (
            {"device_memory": "lots"},
            r"device_memory must be a positive number of bytes, or a text such as '20GiB'.*'lots'",
        ),
        ({"device_memory": "20 apples"}, r"device_memory must be .* got '20 apples'"),
        ({"host_memory": -1}, r"host_memory must be .* got -1"),
        ({"host_memory": True}, r"host_memory must be .* got True"),
        ({"device_memory": float("inf")}, r"device_memory must be .* got inf"),
        ({"chunk_size": 0}, r"chunk_size must be 'auto' or a positive number of elements, got 0"),
        ({"chunk_size": "big"}, r"chunk_size must be 'auto' .* got 'big'"),
        ({"start_method": "magic"}, r"start_method must be one of auto, popen, .* got 'magic'"),
        ({"timeout_seconds": 0}, r"timeout_seconds must be a positive number of seconds, got 0"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GeminiStrategy(**settings)


@pytest.mark.parametrize("size", [1024, 2.5e6, "3GiB", "1.5 gib", "512MB", "100"])
def test_sizes_that_parse(size: Any) -> None:
    GeminiStrategy(device_memory=size)


class _TransformerEngine(Precision):
    precision = "transformer-engine"


@pytest.mark.parametrize("plugin", [DoublePrecision(), _TransformerEngine(), HalfPrecision("16-true")])
def test_precision_plugins(plugin: Precision) -> None:
    with pytest.raises(ConfigurationError, match=f"'16-mixed' or 'bf16-true', got '{plugin.precision}'"):
        trainer(plugins=[plugin])


def test_precision_mode() -> None:
    with pytest.raises(ConfigurationError, match="got '64-true'"):
        trainer(precision="64-true")


def test_a_precision_that_lightning_would_ignore() -> None:
    run = trainer(GeminiStrategy(precision_plugin=GeminiPrecision("32-true")), precision="bf16-mixed")
    with pytest.raises(ConfigurationError, match=r"Trainer\(precision='bf16-mixed'\).*'32-true'.*contradict"):
        run.fit(Module(), loader())


def _frozen(module: Module) -> None:
    module.requires_grad_(False)


def _foreign(module: Module) -> None:
    stray = nn.Parameter(torch.ones(5))
    module.configure_optimizers = lambda: torch.optim.AdamW([*module.parameters(), stray])


def _shared(module: Module) -> None:
    params = list(module.parameters())
    module.automatic_optimization = False
    module.configure_optimizers = lambda: (torch.optim.SGD(params), torch.optim.SGD(params[:1]))


def _lbfgs(module: Module) -> None:
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())


def _changed(module: Module) -> None:
    def on_train_start() -> None:
        module.model.layers[3] = nn.Linear(32, 32)

    module.on_fit_start = on_train_start


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (_frozen, {}, r"no parameter of Module is trainable \(requires_grad is False for all 16\)"),
        (_foreign, {}, r"optimizer 0 \(AdamW\), parameter group 0, has a tensor of shape \(5,\) that is no parameter"),
        (_shared, {}, r"model.layers.0.0.weight is in optimizer 0 and in optimizer 1"),
        (_lbfgs, {}, r"LBFGS\) cannot update flat shards: it evaluates the loss several times"),
        (_changed, {}, r"parameters changed after the chunks were laid out: new: model.layers.3.weight"),
        (None, {"chunk_size": 32}, r"chunk_size must be at least 64 elements.*got 32"),
        (None, {"unit_modules": ["Block"]}, r"unit_modules names 'Block'.*classes here are Linear, Mlp"),
    ],
)
def test_models_and_optimizers(spoil: Callable[[Module], None] | None, settings: dict[str, Any], message: str) -> None:
    module = Module()
    before = [p.detach().clone() for p in module.parameters()]
    if spoil is not None:
        spoil(module)
    params = list(module.parameters())
    with pytest.raises(ConfigurationError, match=message):
        trainer(GeminiStrategy(**settings)).fit(module, loader())
    assert not module.losses, "training had begun"
    for param, value in zip(params, before, strict=True):
        if param.numel() and spoil is not _changed:
            assert torch.equal(param, value)


def test_a_model_without_parameters() -> None:
    class Empty(L.LightningModule):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return torch.zeros((), requires_grad=True)

        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(ConfigurationError, match="Empty has no parameters"):
        trainer().fit(Empty(), loader())


def test_a_device_that_is_too_small_says_what_is_needed() -> None:
    module = Module("opt")
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(OutOfBudgetError, match=r"device memory +[\d.]+ KiB +10.00 KiB +param[\s\S]*'auto' or 'host'"):
        trainer(GeminiStrategy(placement="device", device_memory="10KiB")).fit(module, loader("opt"))
    with pytest.raises(OutOfBudgetError, match=r"host memory +[\d.]+ KiB +10.00 KiB +param[\s\S]*more host memory"):
        trainer(GeminiStrategy(placement="host", host_memory="10KiB")).fit(module, loader("opt"))
    assert all(torch.equal(p, value) for p, value in zip(module.parameters(), before, strict=True))


def test_the_engine_exists_only_during_a_run() -> None:
    strategy = trainer().strategy
    with pytest.raises(RuntimeError, match="only while the Trainer runs"):
        strategy.memory_report()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_memory": None}, "device_memory must be"),
        ({"host_memory": {}}, "host_memory must be"),
        ({"placement": ["device"]}, "placement must be one of"),
        ({"timeout_seconds": "x"}, "timeout_seconds must be a positive number"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds must be a positive number"),
    ],
)
def test_settings_of_another_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GeminiStrategy(**settings)


def test_a_text_is_no_list_of_units() -> None:
    with pytest.raises(ConfigurationError, match=r"unit_modules must be a list, such as \['Linear'\]"):
        trainer(GeminiStrategy(unit_modules="Linear")).fit(Module(), loader())


def test_parameters_that_are_one_memory() -> None:
    module = Module()
    module.model.layers[1][0].weight.data = module.model.layers[0][0].weight.data
    with pytest.raises(ConfigurationError, match=r"layers.0.0.weight and model.layers.1.0.weight share their memory"):
        trainer().fit(module, loader())


def test_a_dtype_that_changes_after_the_layout() -> None:
    module = Module()
    module.on_fit_start = lambda: module.model.layers[0].double()
    with pytest.raises(StateError, match=r"model.layers.0.0.weight.* was changed from outside"):
        trainer().fit(module, loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 1.0}, r"margin must be 'auto' or a share .* got 1.0"),
        ({"margin": -0.1}, "margin must be"),
        ({"margin": True}, "margin must be"),
        ({"prefetch": -1}, "prefetch must be 'auto' or a number of chunks"),
        ({"prefetch": 1.5}, "prefetch must be"),
    ],
)
def test_settings_of_plans(options: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GeminiStrategy(**options)


@pytest.mark.parametrize("name", ["device_memory", "host_memory"])
def test_budgets_beyond_the_machine(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is .* GiB, but this machine has .* GiB"):
        trainer(GeminiStrategy(**{name: "900000 GiB"})).fit(Module(), loader())


def test_a_chunk_that_does_not_fit_is_found_before_the_first_step() -> None:
    with pytest.raises(OutOfBudgetError, match=r"most for model\.[\s\S]*device_memory of [\d.]+ KiB[\s\S]*chunk_size"):
        trainer(GeminiStrategy(device_memory="10KiB", chunk_size=2**15)).fit(Module("opt"), loader("opt"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_refused_model_can_be_tried_again(precision: str) -> None:
    """Built on meta, and with buffers that a precision would have changed."""

    for meta in (False, True):
        with trainer().init_module(empty_init=meta):
            module = Module("ConvNet")
        module.register_buffer("tenth", torch.tensor(0.1)) if not meta else None
        with pytest.raises(ConfigurationError, match="chunk_size must be"):
            trainer(GeminiStrategy(chunk_size=63), precision=precision).fit(module, loader("ConvNet"))
        assert all(p.is_meta == meta for p in module.parameters())
        if not meta:
            assert module.tenth == torch.tensor(0.1)
        trainer().fit(module, loader("ConvNet"))
        assert all(p.isfinite().all() for p in module.parameters())


def test_gradients_from_before_are_not_counted() -> None:
    plain, model = cases.build("Mlp"), cases.build("Mlp")
    x = torch.randn(4, cases.WIDTH)
    model(x).sum().backward()
    ours, theirs = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    engine = shard(model, [ours])
    for step_model, optimizer in ((model, ours), (plain, theirs)):
        optimizer.zero_grad()
        step_model(x).square().sum().backward()
        optimizer.step()
    engine.release()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_model_without_parameters_may_be_evaluated() -> None:
    class Mean(L.LightningModule):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("mean", batch[0].mean())

        def predict_step(self, batch: Any, index: int) -> Tensor:
            return batch[0].mean()

    assert "mean" in trainer().validate(Mean(), loader(), verbose=False)[0]
    assert len(trainer().predict(Mean(), loader())) == 6
