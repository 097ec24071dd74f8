"""The example with an optimizer of its own: SophiaG and its second backward, on chunks as in plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from examples import sophia
from lightning_gemini.core import Home, shard
from tests.lightning_cases import trainer
from tests.ranks import run_ranks
from tests.test_launchers import ROOT, losses, run

STEPS, EVERY = 12, 5

Result = tuple[list[float], dict[str, Tensor], dict[str, Any]]


def train(home: Home | None) -> Result:
    """The example's training in a plain loop; in plain PyTorch on all rows of a batch if ``home`` is ``None``.

    Returns:
        this rank's losses, the parameters and the optimizer's state.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and home else (0, 1)
    torch.manual_seed(0)
    model = sophia.LanguageModel()
    optimizer = model.configure_optimizers()
    options: dict[str, Any] = {"group": dist.group.WORLD, "reduce_group": dist.new_group()} if ranks > 1 else {}
    engine = shard(model, [optimizer], home=home, chunk_size=2**14, **options) if home else None
    assert engine is None or len(engine.layout.chunks) > 5
    seen = []
    for step, rows in enumerate(sophia.data(STEPS * sophia.BATCH).split(sophia.BATCH)):
        tokens, labels = rows[rank::ranks, :-1], rows[rank::ranks, 1:]
        if step % EVERY == 0:
            logits = model(tokens)
            sophia.cross_entropy(logits, sophia.sampled_labels(logits, step, rank, ranks)).backward()
            optimizer.estimate(rows[:, 1:].numel())
            optimizer.zero_grad()
        loss = sophia.cross_entropy(model(tokens), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    state = engine.optimizer_state_dict(optimizer) if engine else optimizer.state_dict()
    if engine:
        engine.release()
    return seen, {key: value.detach() for key, value in model.named_parameters()}, state


@pytest.mark.parametrize("home", list(Home))
def test_sophia_is_bit_exact(home: Home) -> None:
    torch.testing.assert_close(train(home), train(None), rtol=0, atol=0)


def _train_all() -> list[Result]:
    return [train(home) for home in Home]


def test_two_ranks() -> None:
    expected_losses, expected, expected_state = train(None)
    for first, second in zip(*run_ranks(_train_all, 2), strict=True):
        mean = (torch.tensor(first[0]) + torch.tensor(second[0])) / 2
        torch.testing.assert_close(mean, torch.tensor(expected_losses), rtol=1e-5, atol=0)
        for key, value in expected.items():
            torch.testing.assert_close(first[1][key], value, rtol=0, atol=1e-4)
        for number, state in expected_state["state"].items():
            torch.testing.assert_close(first[2]["state"][number], state, rtol=1e-3, atol=1e-6)


def test_the_estimate_is_the_gauss_newton_diagonal() -> None:
    """For a linear softmax model it is known: the mean over the rows of x_i^2 p_j (1 - p_j)."""
    torch.manual_seed(0)
    rows, model = torch.randn(8, 3), nn.Linear(3, 4, bias=False)
    before = model.weight.detach().clone()
    draws = 2000
    optimizer = sophia.SophiaG(model.parameters(), betas=(0.9, 1 - 1 / draws))
    for draw in range(draws):
        logits = model(rows)[None]
        sophia.cross_entropy(logits, sophia.sampled_labels(logits, draw)).backward()
        optimizer.estimate(len(rows))
        optimizer.zero_grad()
    chances = model(rows).softmax(-1)
    expected = (chances * (1 - chances)).T @ rows.square() / len(rows)
    average = optimizer.state[model.weight]["hessian"] / (1 - (1 - 1 / draws) ** draws)
    torch.testing.assert_close(average, expected, rtol=0.1, atol=0)
    assert torch.equal(model.weight, before), "an estimate moves no weight"
    assert not optimizer.state[model.weight]["exp_avg"].any()


def test_a_step_divides_by_the_curvature_and_is_clipped() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = sophia.SophiaG([weight], lr=0.1, betas=(0.5, 0.75), rho=0.5, weight_decay=1.0)
    weight.grad = torch.tensor([0.0, 1.0, 4.0])
    optimizer.estimate(tokens=2)
    torch.testing.assert_close(optimizer.state[weight]["hessian"], torch.tensor([0.0, 0.5, 8.0]))
    weight.grad = torch.tensor([-1e-3, 0.25, 4.0])
    optimizer.step()  # the momentum is half of that
    torch.testing.assert_close(weight.detach(), 0.9 - 0.1 * torch.tensor([-1.0, 0.5, 0.5]))


def final_loss(make: Callable[[Any], Optimizer], estimates: bool) -> float:
    """A linear softmax model on inputs of very different scales: after 200 steps, on chunks."""
    torch.manual_seed(0)
    scales = torch.logspace(-1, 1, 8)
    rows = torch.randn(64, 8) * scales
    labels = sophia.sampled_labels((rows @ torch.randn(8, 4) / scales.norm())[None], 0)
    model = nn.Linear(8, 4)
    optimizer = make(model.parameters())
    shard(model, [optimizer], home=Home.DEVICE)
    for step in range(200):
        if estimates and step % EVERY == 0:
            logits = model(rows)[None]
            sophia.cross_entropy(logits, sophia.sampled_labels(logits, step)).backward()
            optimizer.estimate(len(rows))
        loss = sophia.cross_entropy(model(rows)[None], labels)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_the_curvature_matters() -> None:
    def sophia_g(params: Any) -> Optimizer:
        return sophia.SophiaG(params, lr=0.1, rho=1.0, weight_decay=0.0)

    least = 0.7515
    assert final_loss(sophia_g, estimates=True) == pytest.approx(least, abs=2e-3)
    assert final_loss(sophia_g, estimates=False) > least + 0.2, "signs of the momentum alone go to and fro"
    for lr in (0.01, 0.03, 0.1):
        assert final_loss(lambda params, lr=lr: torch.optim.SGD(params, lr=lr), estimates=False) > least + 0.03


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else Lightning has more where there are ranks, and sums differ


def fit(strategy: str, precision: str, **settings: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = sophia.LanguageModel()
    run = trainer(strategy, precision=precision, **settings)
    run.fit(model)
    assert run.global_step == run.num_training_batches * run.max_epochs, "estimates are no steps"
    return [run.callback_metrics["loss"], *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("strategy", ["gemini", "gemini_host"])
@pytest.mark.usefixtures("one_thread")
def test_in_lightning(strategy: str) -> None:
    short = {"max_epochs": 1, "limit_train_batches": STEPS}
    plain, ours = fit("auto", "32-true", **short), fit(strategy, "32-true", **short)
    assert all(torch.equal(mine, expected) for mine, expected in zip(ours, plain, strict=True))
    mixed = fit(strategy, "bf16-mixed", **short)
    assert {value.dtype for value in mixed[1:]} == {torch.float32}
    torch.testing.assert_close(mixed[0], plain[0], rtol=5e-3, atol=0)
    assert not torch.equal(mixed[0], plain[0])


@pytest.mark.usefixtures("one_thread")
def test_the_program_on_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(sys.executable, str(ROOT / "examples" / "sophia.py"), "--devices", "2")
    fit("auto", "32-true", max_epochs=3, callbacks=[sophia.Printer()])
    assert losses(out) == losses(capsys.readouterr().out)
    assert len(losses(out)) == 3
