"""A run that goes on from a checkpoint does what the run that was not interrupted does, bit for bit."""

from __future__ import annotations

import gc
import multiprocessing
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from lightning_gemini import GeminiStrategy
from lightning_gemini.loaders import PositionedLoader, resumable
from lightning_gemini.random_state import (
    generator_state,
    random_state,
    same_state,
    set_generator_state,
    set_random_state,
    state_for,
)
from tests.lightning_cases import as_file, on_ranks, trainer
from tests.ranks import run_ranks
from tests.resuming import (
    Batches,
    CountedBatches,
    Net,
    Rows,
    Run,
    Saves,
    adamw,
    after,
    batches,
    difference,
    one_cycle,
    sgd,
    trained,
)

#: the users' own samplers, where Lightning would replace them
OWN = {"use_distributed_sampler": False}


class Buckets(Sampler):
    """Draws a new order every eight samples, and goes through it."""

    def __init__(self, length: int = 14) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.length, 6):
            order = np.random.permutation(range(start, min(start + 6, self.length))).tolist()
            random.shuffle(order)
            yield from order


class OneByOne(Buckets):
    def __iter__(self) -> Iterator[int]:
        return (random.randrange(self.length) for _ in range(self.length))


class OrderAndNoise(Buckets):
    """Remembers what it has drawn first, and draws each time."""

    def __iter__(self) -> Iterator[int]:
        for index in np.random.permutation(self.length).tolist():
            yield (index + random.randrange(2)) % self.length


class AtOnce(Buckets):
    """Draws when it is asked for an iterator."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length).tolist())


class OwnBatches(Sampler):
    def __init__(self, sampler: Any, batch_size: int = 4, drop_last: bool = False) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(BatchSampler(self.sampler, self.batch_size, self.drop_last)))


def sampled(sampler: type[Sampler], workers: int = 0) -> Callable[[], Any]:
    return lambda: batches(shuffle=False, workers=workers, sampler=sampler())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def workers(**settings: Any) -> Callable[[], Any]:
    return lambda: batches(workers=2, **settings)


def pair(mode: str) -> Callable[[], Any]:
    """A long loader and one that ends, or begins again, before it."""
    return lambda: CombinedLoader({"long": batches(), "short": DataLoader(Rows(10, True), 4, shuffle=True)}, mode)


RUNS = {
    "samplers of Lightning": Run(every=3),
    "sharded": Run(strategy={"state_dict_type": "sharded"}, every=3),
    "sharded, in the background": Run(strategy={"state_dict_type": "sharded", "async_save": True}, every=4),
    "samplers of the user": Run(settings=OWN),
    "a generator of the loader's own": Run(lambda: batches(generator=generator()), settings=OWN, every=3),
    "a batch at a time": Run(
        lambda: DataLoader(Rows(noisy=True), batch_sampler=OwnBatches(AtOnce())), settings=OWN, every=3
    ),
    "and those that Lightning wraps": Run(
        lambda: DataLoader(Rows(noisy=True), batch_sampler=OwnBatches(Buckets())), every=3
    ),
    "buckets": Run(sampled(Buckets), settings=OWN, every=3),
    "buckets in batches": Run(
        lambda: DataLoader(Rows(noisy=True), batch_sampler=BatchSampler(Buckets(), 4, False)), settings=OWN, every=7
    ),
    "one index at a time": Run(sampled(OneByOne), settings=OWN, every=3),
    "workers": Run(workers(), settings={"limit_train_batches": 3}, every=3),
    "workers that draw, between epochs": Run(
        lambda: DataLoader(Rows(noisy=True), 4, num_workers=2), hooks=("on_train_epoch_end",)
    ),
    "workers and one index at a time": Run(sampled(OneByOne, 2), settings=OWN, every=5),
    "workers and an eager sampler": Run(sampled(AtOnce, 2), settings=OWN, every=5),
    "workers that stay": Run(workers(persistent_workers=True), settings=OWN, every=5),
    "loaders that begin again": Run(pair("max_size_cycle"), settings=OWN, every=3),
    "loaders that end": Run(pair("max_size"), settings=OWN, every=3),
    "a stateful loader": Run(lambda: CountedBatches(batches(False, noisy=False)), every=3),
    "a stateful loader without a length": Run(lambda: Batches(batches(False, noisy=False)), every=2),
    "a stateful one beside another": Run(
        lambda: {"a": CountedBatches(batches(False, noisy=False)), "b": batches()}, settings=OWN, every=3
    ),
    "the batches are asked for early": Run(workers(), one_cycle, settings=OWN, every=5),
    "accumulation": Run(settings={"accumulate_grad_batches": 3} | OWN),
    "validation in the middle": Run(optimizer=sgd, settings={"val_check_interval": 2} | OWN),
    "validation across epochs": Run(settings={"val_check_interval": 3, "check_val_every_n_epoch": None} | OWN, every=2),
    "validation in each second epoch": Run(settings={"check_val_every_n_epoch": 2} | OWN, every=3),
    "no validation": Run(settings={"limit_val_batches": 0} | OWN, every=3),
    "loaders that are made anew": Run(settings={"reload_dataloaders_every_n_epochs": 1} | OWN, every=5),
    "and in each second epoch": Run(
        settings={"reload_dataloaders_every_n_epochs": 2, "max_epochs": 4, "limit_train_batches": 2} | OWN, every=3
    ),
    "a number of steps": Run(optimizer=sgd, settings={"max_steps": 7, "max_epochs": -1} | OWN),
    "steps without validation": Run(settings={"max_steps": 7, "max_epochs": -1, "limit_val_batches": 0} | OWN, every=4),
    "before there is anything": Run(hooks=("on_fit_start", "on_train_start", "on_train_epoch_start"), settings=OWN),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_place(name: str, tmp_path: Path) -> None:
    assert RUNS[name].differences(tmp_path) == []


# Where chunks are, in which precision


def plan(optimizer: Callable[[Net], Any], precision: str, moving: bool, *, every: int = 4, **strategy: Any) -> Run:
    scale = {"initial_scale": 2.0**10, "growth_interval": 2} if precision == "16-mixed" else {}
    strategy = {"state_dict_type": "sharded", **strategy}
    return Run(
        optimizer=optimizer, strategy=strategy, precision={"precision": precision, **scale}, moving=moving, every=every
    )


PLANS = {
    "kept, fp32, AdamW": plan(adamw, "32-true", False, placement="device"),
    "host, bf16, AdamW": plan(adamw, "bf16-mixed", True, placement="host"),
    "host, fp16, SGD": plan(sgd, "16-mixed", True, placement="host", device_memory="12KiB"),
    "a small device, bf16, SGD": plan(sgd, "bf16-mixed", True, placement="auto", device_memory="8KiB"),
    "a small device, fp16, AdamW": plan(adamw, "16-mixed", True, placement="auto", device_memory="8KiB"),
    "a small device, fp32, SGD": plan(sgd, "32-true", True, placement="auto", device_memory="8KiB"),
}
ON_RANKS = {
    "kept, fp32, AdamW": plan(adamw, "32-true", False, placement="device"),
    "a small device, bf16, AdamW": plan(adamw, "bf16-mixed", True, device_memory="6KiB"),
    "host, fp16, SGD": plan(sgd, "16-mixed", True, placement="host"),
    "loaders of the ranks' own": Run(lambda: CountedBatches(batches(False, noisy=False)), every=3),
    "and without a length": Run(lambda: Batches(batches(False, noisy=False)), every=4),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_plan(name: str, tmp_path: Path) -> None:
    assert PLANS[name].differences(tmp_path) == []


def _differences(folder: Path) -> dict[str, Any]:
    on_ranks()
    found: dict[str, Any] = {}
    for number, (name, run) in enumerate(ON_RANKS.items()):
        try:
            found[name] = run.differences(folder / str(number))
        except Exception:
            found[name] = traceback.format_exc()
    return found


@cache
def _on_two_ranks() -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        return run_ranks(_differences, 2, Path(folder))


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks(name: str) -> None:
    for found in _on_two_ranks():
        assert found[name] == []


# Epochs that were cut short, and runs that are interrupted again and again


class Steps(Saves):
    """Stops after so many steps, the way that somebody wants it."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(folder, "on_train_end")
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.steps


@pytest.mark.parametrize("how", ["max_steps", "should_stop"])
def test_an_epoch_that_was_cut_short_is_taken_up_again(how: str, tmp_path: Path) -> None:
    run = Run(settings={**OWN, "limit_val_batches": 0, "max_epochs": 3})
    whole = Saves(tmp_path / "whole", "on_train_end")
    straight = trained(run.fit(whole).events)
    done: list[Any] = []
    path = None
    for steps in (2, 5, 9, 12):
        part = Steps(tmp_path / str(steps), steps)
        settings = {"max_steps": steps} if how == "max_steps" else {}
        done += trained(run.fit(part, path, **settings).events)
        (path,) = part.marks
    assert done == straight
    ours, theirs = (torch.load(as_file(path), weights_only=True) for path in (path, *whole.marks))
    assert difference(ours["state_dict"], theirs["state_dict"]) == ""
    assert difference(ours["optimizer_states"], theirs["optimizer_states"]) == ""
    assert difference(ours["lightning_gemini"], theirs["lightning_gemini"]) == ""


def test_model_checkpoints_and_an_error(tmp_path: Path) -> None:
    """As it happens: a run that saves now and then fails, and goes on from the last checkpoint."""

    class Fails(ModelCheckpoint):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == self.fails:
                raise ZeroDivisionError

    def saver(fails: int = -1) -> Fails:
        saver = Fails(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        saver.fails = fails
        return saver

    run = Run(settings={**OWN, "enable_checkpointing": True})
    straight = run.fit(saver()).events
    with pytest.raises(ZeroDivisionError):
        run.fit(saver(fails=5))
    went_on = run.fit(saver(), tmp_path / "step=3-v1.ckpt").events
    assert went_on[0][0] == "train 3"
    assert went_on == straight[straight.index(went_on[0]) :]


def test_a_checkpoint_that_is_saved_again_before_anything_is_done(tmp_path: Path) -> None:
    run = Run(settings=OWN | {"max_epochs": 1})
    saves = Saves(tmp_path / "first", "on_train_batch_end")
    straight = run.fit(saves).events
    for path in (list(saves.marks)[1], list(saves.marks)[3]):
        again = Saves(tmp_path / path.stem, "on_train_start")
        run.fit(again, path)
        (copied,) = again.marks
        assert run.fit(Callback(), copied).events == after(path, straight[saves.marks[path] :])


# What cannot be exact


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from Rows()


class CountedStream(Stream):
    def __len__(self) -> int:
        return 14


def said(run: Run, *arguments: Any, **settings: Any) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(*arguments, **settings)
    return "\n".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("train", "warning"),
    [(CountedStream, "your dataloader is not resumable"), (Stream, "a training loader is an iterable without state")],
)
def test_an_iterable_begins_again_and_a_warning_says_so(train: Any, warning: str, tmp_path: Path) -> None:
    run = Run(lambda: DataLoader(train(), 4), settings={"max_epochs": 1})
    saves = Saves(tmp_path, "on_train_batch_end", "on_train_epoch_end")
    run.fit(saves)
    first, *_, last = saves.marks
    assert warning in said(run, Callback(), first)
    assert warning not in said(run, Callback(), last, max_epochs=2)


def test_a_save_while_gradients_accumulate_says_what_is_lost(tmp_path: Path) -> None:
    class Anywhere(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.batch_idx}.ckpt")

    run = Run(settings={"accumulate_grad_batches": 2, "max_epochs": 1})
    assert "saved while gradients are being accumulated" in said(run, Anywhere())
    assert run.fit(Callback(), tmp_path / "0.ckpt").events[0][0] == "train 1"


def test_other_loaders_than_before_begin_again_and_a_warning_says_so(tmp_path: Path) -> None:
    saves = Saves(tmp_path, "on_train_batch_end")
    Run().fit(saves)
    path = next(iter(saves.marks))
    assert "1 training loaders (position), but this run has 2 (position, state)" in said(
        Run(lambda: {"a": batches(), "b": CountedBatches(batches(False))}), Callback(), path
    )


# Checkpoints between this strategy and others, and between numbers of ranks


@pytest.mark.parametrize("stateful", [False, True])
def test_plain_lightning_goes_on_from_ours_and_ours_from_plain(stateful: bool, tmp_path: Path) -> None:
    def fit(strategy: Any, saves: Callback, path: Path | None = None) -> Net:
        torch.manual_seed(0)
        random.seed(0)
        module, train = Net(adamw), batches(shuffle=False, noisy=False)
        data = CountedBatches(train) if stateful else train
        trainer(strategy, callbacks=[saves], max_epochs=1).fit(module, data, ckpt_path=path)
        return module

    pairs = [(GeminiStrategy(state_dict_type="full"), "auto"), ("auto", GeminiStrategy())]
    for number, (first, then) in enumerate(pairs):
        saves = Saves(tmp_path / str(number), "on_train_batch_end")
        straight = trained(fit(first, saves).events)
        resumed = trained(fit(then, Callback(), list(saves.marks)[1]).events)
        assert [event[0] for event in resumed] == ["train 2", "train 3"]
        if stateful or then != "auto":  # plain Lightning does not know where its loaders were
            assert [event[3] for event in resumed] == [event[3] for event in straight[-2:]]


class Drawn(Callback):
    """What this process could draw when the first batch has been fetched."""

    state: Any = None

    def on_train_batch_start(self, *_: Any) -> None:
        self.state = self.state or random_state()


def _go_on(path: Path) -> tuple[Any, Any]:
    if torch.distributed.is_initialized():
        on_ranks()
    drawn = Drawn()
    return STATEFUL.fit(drawn, path).events[0], drawn.state


def _save(folder: Path) -> list[Any]:
    on_ranks()
    STATEFUL.fit(Saves(folder, "on_train_batch_end"))
    return [torch.load(as_file(path), weights_only=True) for path in sorted(folder.glob("*.ckpt"))]


STATEFUL = Run(lambda: CountedBatches(batches(False, noisy=False)), settings={"max_epochs": 1})


def test_another_number_of_ranks_goes_on_with_the_same_batch(tmp_path: Path) -> None:
    saves = Saves(tmp_path / "one", "on_train_batch_end")
    straight = trained(STATEFUL.fit(saves).events)
    path = list(saves.marks)[1]
    (saved,) = torch.load(as_file(path), weights_only=True)["lightning_gemini"]["ranks"]
    for number, (event, state) in enumerate(run_ranks(_go_on, 2, path)):
        assert event[:4] == straight[2][:4]
        assert same_state(state, saved["random"] if number == 0 else state_for(saved["random"], 1))
    checkpoint = run_ranks(_save, 2, tmp_path / "two")[0][1]
    event, state = _go_on(sorted((tmp_path / "two").glob("*.ckpt"))[1])
    assert event[0] == "train 2"
    assert same_state(state, checkpoint["lightning_gemini"]["ranks"][0]["random"])
    assert not same_state(*(own["random"] for own in checkpoint["lightning_gemini"]["ranks"]))


# The parts


def draws(*more: Any) -> list[Any]:
    return [random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist(), *(draw() for draw in more)]


def test_random_states_are_plain_and_put_back(tmp_path: Path) -> None:
    own = [random.Random(1), np.random.default_rng(1), np.random.RandomState(1), torch.Generator().manual_seed(1)]
    more = [own[0].random, own[1].random, own[2].rand, lambda: torch.rand((), generator=own[3]).item()]
    draws(*more)
    torch.save([random_state(), *map(generator_state, own)], tmp_path / "state")
    first = draws(*more)
    assert draws(*more) != first
    state, *states = torch.load(tmp_path / "state", weights_only=True)
    set_random_state(state)
    for generator, its_state in zip(own, states, strict=True):
        set_generator_state(generator, its_state)
    assert draws(*more) == first


def test_states_for_other_ranks_are_their_own_and_always_the_same() -> None:
    state, seen = random_state(), []
    for number in (1, 2, 1):
        set_random_state(state_for(state, number))
        seen.append(draws())
    assert seen[0] == seen[2]
    assert all(a != b for a, b in zip(seen[0], seen[1], strict=True))


@pytest.mark.gpu
def test_the_state_of_cuda_is_put_back() -> None:
    def draw() -> list[float]:
        return torch.rand(3, device="cuda").tolist()

    draw()
    state = random_state()
    first = draw()
    set_random_state(state)
    assert draw() == first
    set_random_state(state_for(state, 1))
    assert draw() != first


@pytest.mark.parametrize("done", [0, 2, 3])
@pytest.mark.parametrize("kind", [OneByOne, Buckets, AtOnce, OrderAndNoise])
def test_a_position_in_a_plain_loop(kind: type[Sampler], done: int) -> None:
    def make() -> PositionedLoader:
        return resumable(DataLoader(Rows(noisy=True), 4, sampler=kind()))

    loader = make()
    iterator = iter(loader)
    draws()
    for _ in range(done):
        next(iterator)
        draws()
    state, now = loader.state_dict(), random_state()
    rest = [[rows.tolist(), numbers.tolist(), draws()] for rows, numbers in iterator]
    again = make()
    again.load_state_dict(state)
    draws()
    set_random_state(now)
    assert [[rows.tolist(), numbers.tolist(), draws()] for rows, numbers in again] == rest
    assert len(list(again)) == 4, "a position is gone to once"


def test_a_position_beyond_the_end_is_the_end() -> None:
    loader = resumable(DataLoader(Rows(8), 4))
    loader.load_state_dict({"batches": 3})
    assert list(loader) == []


class Reversed(DataLoader):
    def __iter__(self) -> Any:
        return reversed(list(super().__iter__()))


class Named(DataLoader):
    name = "named"


def test_which_loaders_know_their_position() -> None:
    unordered = DataLoader(Rows(), 4, num_workers=1, in_order=False)
    for loader in (Reversed(Rows(), 4), unordered, DataLoader(Stream(), 4), [1, 2], CountedBatches(batches())):
        assert resumable(loader) is loader
    named = Named(Rows(), 4)
    known = resumable(named)
    assert isinstance(known, Named)
    assert isinstance(known, PositionedLoader)
    assert known.name == "named"
    assert (known.dataset, known.batch_sampler, len(known)) == (named.dataset, named.batch_sampler, 4)
    assert type(named) is Named
    assert resumable(known) is not known
    assert resumable(known).state_dict() == {}


def test_looking_at_a_batch_does_not_move_the_position(tmp_path: Path) -> None:
    class Looks(Saves):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            next(iter(trainer.train_dataloader))

    saves = Looks(tmp_path, "on_train_batch_end")
    run = Run(settings={**OWN, "max_epochs": 1, "limit_val_batches": 0})
    straight = run.fit(saves).events
    path = list(saves.marks)[1]
    assert run.fit(Looks(tmp_path), path).events == after(path, straight[saves.marks[path] :])


def test_no_worker_outlives_its_iterator() -> None:
    gc.disable()
    try:
        loader = resumable(batches(workers=2))
        iterator = iter(loader)
        next(iterator)
        assert len(multiprocessing.active_children()) == 2
        del iterator
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_a_save_after_the_run_and_another_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's sampler shuffles by the global seed, and its loops have let go of the loaders when fit is over."""

    def go(steps: int, path: Path | None = None, seed: str = "1") -> tuple[list[Any], L.Trainer]:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        torch.manual_seed(9 if path else 0)
        module = Net(adamw)
        run = trainer(GeminiStrategy(chunk_size=512), max_steps=steps, use_distributed_sampler=True)
        run.fit(module, batches(noisy=False), ckpt_path=path)
        return trained(module.events), run

    straight, _ = go(-1)
    first, run = go(2)
    run.save_checkpoint(tmp_path / "saved")
    rest, _ = go(-1, tmp_path / "saved", seed="5")
    assert difference(first + rest, straight) == ""
