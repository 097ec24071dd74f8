"""Ranks that do not do the same thing: made to work, or ended together with words that help."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_gemini import GeminiStrategy
from lightning_gemini.core import shard
from lightning_gemini.core.errors import PeerError
from tests import cases
from tests.lightning_cases import Module, loader, on_ranks, trainer
from tests.ranks import RankError, run_ranks

STRATEGIES = {"kept": {"placement": "device"}, "host": {"placement": "host", "chunk_size": 1088}}


# One rank fails


class FailsInTraining(Module):
    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.trainer.global_step == 2 and dist.get_rank() == 1:
            raise ValueError("the cat walked over the keyboard")
        return super().training_step(batch, index)


class FailsAfterBackward(Module):
    def on_after_backward(self) -> None:
        if self.trainer.global_step == 2 and dist.get_rank() == 0:
            raise ValueError("the cat walked over the keyboard")


class FailsInValidation(Module):
    def validation_step(self, batch: Any, index: int) -> None:
        if not self.trainer.sanity_checking and dist.get_rank() == 1:
            raise ValueError("the cat walked over the keyboard")
        super().validation_step(batch, index)


class FailsAtTheEndOfAnEpoch(Module):
    def on_train_epoch_end(self) -> None:
        if dist.get_rank() == 1:
            raise ValueError("the cat walked over the keyboard")


def _fit(cls: type[Module], strategy: dict[str, Any], name: str) -> None:
    on_ranks()
    trainer(GeminiStrategy(**strategy)).fit(cls(name), loader(name), loader(name))


@pytest.mark.parametrize(
    ("cls", "strategy", "rank"),
    [
        (FailsInTraining, "kept", 1),
        (FailsInTraining, "host", 1),
        (FailsAfterBackward, "host", 0),
        (FailsInValidation, "host", 1),
        (FailsAtTheEndOfAnEpoch, "host", 1),
    ],
)
def test_an_exception_on_one_rank_ends_the_others_with_its_text(cls: type[Module], strategy: str, rank: int) -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(_fit, 2, cls, STRATEGIES[strategy], "Mlp", timeout=40)
    said = str(raised.value)
    assert "did not end" not in said
    assert said.count("ValueError: the cat walked over the keyboard\n") == 2  # the rank's own, and the other's report
    assert f"PeerError: rank {rank} failed: ValueError: the cat walked over the keyboard" in said


# Ranks run different units


class Branch(nn.Module):
    """One of two layers, by rank."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(cases.WIDTH, cases.WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.ways[dist.get_rank()](x) if dist.is_initialized() else self.ways[0](x)


class Branches(Module):
    def __init__(self, name: str = "Mlp") -> None:
        super().__init__(name)
        self.model = nn.Sequential(*(nn.Linear(cases.WIDTH, cases.WIDTH) for _ in range(3)))  # each fills a chunk
        self.model.insert(1, Branch())

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.model(batch[0]).square().mean()


class BranchesInEvaluation(Branches):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.model[0](batch[0]).square().mean() + self.model[2](batch[0]).square().mean()


@pytest.mark.parametrize("cls", [Branches, BranchesInEvaluation])
def test_every_rank_names_the_unit_that_differs(cls: type[Module]) -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(_fit, 2, cls, STRATEGIES["host"], "Mlp", timeout=40)
    said = re.sub(r"\s+", " ", str(raised.value))
    own = "DisagreementError: the ranks do not run the same units: this rank gathered chunk"
    assert own in said
    assert f"PeerError: rank 0 failed: {own}" in said
    assert re.search(r"for model\.1\.ways\.0", said)
    assert "unit_modules" in said
    assert "did not end" not in said


def _fit_branches() -> list[list[float]]:
    on_ranks()
    losses = []
    for strategy in ({**STRATEGIES["host"], "unit_modules": ["Branch"]}, STRATEGIES["kept"]):
        module = Branches()
        trainer(GeminiStrategy(**strategy), max_epochs=1).fit(module, loader(), loader())
        losses.append(module.losses)
    return losses


def test_a_branch_works_as_one_unit_or_with_kept_chunks() -> None:
    coarse, kept = run_ranks(_fit_branches, 2)[0]
    assert coarse == pytest.approx(kept, rel=1e-5)
    assert kept[-1] < kept[0]


class Generates(Module):
    """Prompts of other lengths on each rank, so other numbers of forwards."""

    def __init__(self, name: str = "opt") -> None:
        super().__init__(name)
        self.texts: list[list[int]] = []

    def validation_step(self, batch: Any, index: int) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        out = self.model.generate(
            batch[0][:1, : 3 + rank],
            max_new_tokens=4 + 3 * rank,
            do_sample=False,
            use_cache=False,
            eos_token_id=None,
            synced_gpus=dist.is_initialized(),
        )
        self.texts.append(out[0].tolist())


def _generate() -> list[list[list[int]]]:
    on_ranks()
    texts = []
    for strategy in STRATEGIES.values():
        module = Generates()
        trainer(GeminiStrategy(**strategy)).validate(module, loader("opt"), verbose=False)
        texts.append(module.texts)
    return texts


def test_generate_inside_validation_step() -> None:
    kept, host = run_ranks(_generate, 2)[1]
    assert kept == host
    assert {len(text) for text in kept} == {4 + 7}


# Uneven loaders


class Endless(IterableDataset):
    """Without a length; ``rows[rank]`` long."""

    def __init__(self, rows: tuple[int, int]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.rows[dist.get_rank()]):
            yield torch.randn(cases.WIDTH, generator=generator)


class Wrapped(Module):
    def loss(self, batch: Any) -> Tensor:
        return self.model(batch).square().mean()


def _iterables() -> list[tuple[int, int, int]]:
    on_ranks()
    found = []
    for strategy in STRATEGIES.values():
        for rows in ((8, 12), (13, 8)):
            module, validated = Wrapped(), []
            module.validation_step = lambda batch, index, validated=validated: validated.append(index)
            data = DataLoader(Endless(rows), batch_size=2)
            run = trainer(GeminiStrategy(**strategy), max_epochs=2)
            run.fit(module, data, DataLoader(Endless(rows[::-1]), batch_size=2))
            found.append((run.global_step, len(module.losses), len(validated)))
    return found


def test_loaders_without_a_length_end_together() -> None:
    sanity, evaluations = 2, 2 * 4
    assert run_ranks(_iterables, 2) == [[(8, 8, sanity + evaluations)] * 4] * 2


def _sized(stage: str) -> str:
    on_ranks()
    module = Module()
    uneven = DataLoader(torch.utils.data.TensorDataset(torch.randn(8 + 4 * dist.get_rank(), cases.WIDTH)), batch_size=2)
    run = trainer("gemini_host")
    try:
        run.fit(module, uneven) if stage == "training" else getattr(run, stage)(module, uneven)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(("stage", "word"), [("training", "train"), ("validate", "val"), ("predict", "predict")])
def test_loaders_of_different_lengths_are_refused(stage: str, word: str) -> None:
    for said in run_ranks(_sized, 2, stage):
        assert "ConfigurationError: the ranks have different numbers of" in said
        assert re.search(rf"rank 0: \[4\], rank 1: \[6\].*limit_{word}_batches", said)


class Reloads(Module):
    def train_dataloader(self) -> DataLoader:
        rows = 8 + 4 * dist.get_rank() * (self.trainer.current_epoch > 0)
        return DataLoader(torch.utils.data.TensorDataset(torch.randn(rows, cases.WIDTH)), batch_size=2)


def _reloads() -> str:
    on_ranks()
    try:
        trainer("gemini_host", reload_dataloaders_every_n_epochs=1).fit(Reloads())
    except Exception as error:
        return str(error)
    return "nothing"


def _predicts_without_parameters() -> int:
    class Mean(L.LightningModule):
        def predict_step(self, batch: Any, index: int) -> Tensor:
            return batch.mean()

    on_ranks()
    return len(trainer("gemini").predict(Mean(), DataLoader(Endless((8, 12)), batch_size=2)))


def test_loaders_that_are_new_in_each_epoch_and_models_without_parameters() -> None:
    for said in run_ranks(_reloads, 2):
        assert re.search(r"rank 0: \[4\], rank 1: \[6\]", said)
    assert run_ranks(_predicts_without_parameters, 2) == [4, 4]


# Callbacks that cannot work


def _refused() -> dict[str, Callable[[], L.Callback]]:
    from lightning.pytorch import callbacks

    return {
        "EMAWeightAveraging": lambda: callbacks.EMAWeightAveraging(),
        "WeightAveraging": lambda: callbacks.WeightAveraging(),
        "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(0.1),
        "ModelPruning": lambda: callbacks.ModelPruning("l1_unstructured", amount=0.5),
        "BackboneFinetuning": lambda: callbacks.BackboneFinetuning(),
    }


@pytest.mark.parametrize("name", _refused())
def test_callbacks_on_whole_weights_are_refused(name: str) -> None:
    from lightning_gemini.core import ConfigurationError

    module = Module()
    module.backbone = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=rf"cannot run the callback {name}: .*\. (Use|Prune|Give) "):
        trainer(callbacks=[_refused()[name]()]).fit(module, loader())
    assert not module.losses


# The model after a run


class AllFail(Module):
    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.trainer.global_step == 2:
            raise ValueError("on every rank")
        return super().training_step(batch, index)


def _fail_and_go_on() -> dict[str, Any]:
    on_ranks()
    found: dict[str, Any] = {}
    for key, strategy in STRATEGIES.items():
        module, again = AllFail(), Module()
        with pytest.raises(ValueError, match="on every rank"):
            trainer(GeminiStrategy(**strategy)).fit(module, loader())
        trainer(GeminiStrategy(**strategy), max_steps=2).fit(again, loader())
        found[key] = [[p.detach().clone() for p in m.parameters()] for m in (module, again)]
    small = Module()
    said = pytest.warns(UserWarning, match="do not fit into the host memory of every rank")
    with said if dist.get_rank() == 0 else nullcontext():
        trainer(GeminiStrategy("device", device_memory="205KiB", chunk_size=1088, host_memory="20KiB")).fit(
            small, loader()
        )
    found["small"] = [p.detach().isnan().all().item() for p in small.parameters()]
    return found


def test_the_model_after_an_exception_on_all_ranks_and_the_next_fit() -> None:
    plain = Module()
    trainer("auto", max_steps=2).fit(plain, loader())
    for found in run_ranks(_fail_and_go_on, 2):
        for values in (*found["kept"], *found["host"]):
            torch.testing.assert_close(values, [p.detach() for p in plain.parameters()], rtol=2e-3, atol=3e-4)
        assert all(found["small"])


# Exchanges that cannot even begin


def _broken_while_a_chunk_is_coming() -> str:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = {"group": dist.group.WORLD, "reduce_group": dist.new_group()}
    engine = shard(model, [optimizer], chunk_size=1088, placement="host", **groups)
    for _ in range(3):  # recorded, and then by a plan, with chunks that come ahead of their need
        with engine.forward("a step"):
            loss = model(torch.ones(2, 32)).square().mean()
        with engine.backward():
            loss.backward()
        optimizer.step()

    def gather(*_: Any) -> Any:
        raise PeerError("the others are gone")

    engine.store.collectives.gather = gather  # type: ignore[method-assign]
    try:
        with engine.forward("a step"):
            model(torch.ones(2, 32))
    except Exception as error:
        return repr(error)
    finally:
        del engine.store.collectives.gather
        engine.release()
    return "nothing"


def test_what_is_raised_is_why_a_gather_could_not_begin() -> None:
    assert run_ranks(_broken_while_a_chunk_is_coming, 2) == ["PeerError('the others are gone')"] * 2
