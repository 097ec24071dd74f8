"""Sharded checkpoints that are written in the background, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_gemini import GeminiStrategy, ShardedWeightAveraging
from lightning_gemini.checkpoint.background import BackgroundSaves
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME
from lightning_gemini.core.errors import (
    CheckpointError,
    CheckpointWriteError,
    OutOfBudgetError,
)
from lightning_gemini.core.memory import Tier, format_bytes
from lightning_gemini.core.store import Store
from tests.background import as_late_as_possible
from tests.lightning_cases import Module, loader, trainer
from tests.outcomes import check, rank, ranks
from tests.saved_runs import (
    BACKGROUND,
    STRATEGIES,
    Calls,
    Norms,
    Note,
    assert_same,
    full_disk,
    held_back,
    raised,
    resumed,
    shared_folder,
    step_of,
    together,
)

SCENARIOS: list[Callable[[], None]] = []


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS.append(function)
    return function


@scenario
def what_is_saved_is_the_state_of_the_save() -> None:
    kept = {"chunk_size": 4096, "async_save": True}
    host = {**kept, "placement": "host", "device_memory": "1MiB"}
    for settings, precision in ((kept, "32-true"), (host, "bf16-mixed"), (kept, "bf16-mixed")):
        with shared_folder() as folder, held_back() as gate, as_late_as_possible():
            note = Note(folder / "a")
            still_held = Calls(step_4=lambda _, gate=gate: (gate.words.append("step 4"), gate.open()))
            run = trainer(
                GeminiStrategy(**settings),
                precision=precision,
                callbacks=[ShardedWeightAveraging(decay=0.5), note, still_held],
                max_epochs=1,
                val_check_interval=1,
                limit_val_batches=1,
            )
            run.fit(Norms(), loader("ConvNet"), loader("ConvNet"))
            assert gate.words == ["copied", "begins a", "step 4", "opened", "ends a"]
            again = resumed(folder / "a", Norms(), ShardedWeightAveraging(decay=0.5), precision=precision)
            assert_same(again, note.saved)
            assert rank() or len(again[3][0][0]) > 0
            assert step_of(folder / "a") == 2


@scenario
def a_second_save_and_the_end_of_fit_wait() -> None:
    with shared_folder() as folder, held_back() as gate:

        def save_again(run: L.Trainer) -> None:
            gate.open(after=0.2)
            run.save_checkpoint(folder / "b")

        run = trainer(GeminiStrategy(**BACKGROUND), callbacks=[Note(folder / "a"), Calls(step_3=save_again)])
        run.fit(Module(), loader())
        assert gate.words == ["copied", "begins a", "opened", "ends a", "copied", "begins b", "ends b"]
        assert (step_of(folder / "a"), step_of(folder / "b")) == (2, 3)
    with shared_folder() as folder, held_back() as gate:
        save = Calls(step_3=lambda run: (run.save_checkpoint(folder / "a"), gate.open(after=0.2)))
        trainer(GeminiStrategy(**BACKGROUND), callbacks=[save], max_steps=3).fit(Module(), loader())
        assert gate.words == ["copied", "begins a", "opened", "ends a"]
        assert step_of(folder / "a") == 3


@scenario
def a_write_that_fails_is_an_error_of_the_next_step_on_all_ranks() -> None:
    for late in (0.0, 0.3):
        with shared_folder() as folder, full_disk(late) as fill:

            def save(run: L.Trainer, folder: Path = folder) -> None:
                run.save_checkpoint(folder / "a")
                run.strategy._checkpoints.wait()

            def save_in_vain(run: L.Trainer, folder: Path = folder, fill: Any = fill, late: float = late) -> None:
                fill()
                run.save_checkpoint(folder / "a")
                under_way = run.strategy._checkpoints._saves._saving
                if not late or rank() == 0:  # the others do not know yet
                    wait([under_way])

            run = trainer(GeminiStrategy(**BACKGROUND), callbacks=[Calls(step_1=save, step_2=save_in_vain)])
            error = raised(lambda run=run: run.fit(Module(), loader()))
            assert isinstance(error, CheckpointWriteError), error
            assert "No space left" in str(error)
            assert together((str(error), run.global_step)) == [(str(error), run.global_step)] * ranks()
            assert run.global_step == 2 or late
            assert step_of(folder / "a") == 1


@scenario
def a_write_that_fails_at_once_can_be_caught() -> None:
    for settings in STRATEGIES.values():
        with shared_folder() as folder, full_disk() as fill:
            seen = []

            def save_in_vain(run: L.Trainer, folder: Path = folder, fill: Any = fill, seen: list[Any] = seen) -> None:
                fill()
                try:
                    run.save_checkpoint(folder / "a")
                    run.strategy._checkpoints.wait()
                except CheckpointWriteError as error:
                    seen.append(str(error))

            plain, ours = Module(), Module()
            trainer(GeminiStrategy(**settings), max_steps=4).fit(plain, loader())
            trainer(GeminiStrategy(**settings), max_steps=4, callbacks=[Calls(step_2=save_in_vain)]).fit(ours, loader())
            assert_same(ours.state_dict(), plain.state_dict())
            assert together(seen) == [seen] * ranks()
            assert "No space left" in seen[0]
            assert not list(folder.iterdir())


def settled(run: L.Trainer) -> Tier:
    """Host memory, when no update is under way."""
    store: Store = run.strategy.engine.store
    assert all(chunk.shard.numel() for chunk in store.chunks)
    return store.host


@scenario
def a_snapshot_is_host_memory_that_is_given_back() -> None:
    with shared_folder() as folder, held_back() as gate:
        sizes, tiers, reports = [], [], []

        def save(run: L.Trainer) -> None:
            tiers.append(settled(run))
            sizes.append(tiers[0].used)
            run.save_checkpoint(folder / "a")
            sizes.append(tiers[0].used)
            reports.append(run.strategy.memory_report())
            gate.open()

        run = trainer(GeminiStrategy(**BACKGROUND), callbacks=[Calls(step_2=save, step_4=save)], max_steps=5)
        run.fit(Module(), loader())
        snapshot = sizes[1] - sizes[0]
        assert sum(together(snapshot)) >= 12 * sum(param.numel() for param in Module().parameters())
        assert sizes[3] == sizes[2] == sizes[1], "the memory is used again, and not for anything else"
        assert format_bytes(sizes[1]) in reports[0], reports[0]
        assert tiers[0].used == 0


@scenario
def a_snapshot_without_room_is_an_error_on_all_ranks() -> None:
    with shared_folder() as folder:
        used: list[int] = []
        look = Calls(step_2=lambda run: used.append(settled(run).peak))
        trainer(GeminiStrategy(**BACKGROUND), callbacks=[look], max_steps=2).fit(Module(), loader())
        save, room = Calls(step_2=lambda run: run.save_checkpoint(folder / "a")), used[0] * 5 // 4
        run = trainer(GeminiStrategy(**BACKGROUND, host_memory=room), callbacks=[save], max_steps=3)
        error = raised(lambda: run.fit(Module(), loader()))
        assert isinstance(error, OutOfBudgetError), error
        assert "the snapshot of a checkpoint (async_save=True) needs" in str(error), error
        for full in range(ranks()):
            lacking = [OutOfBudgetError("no room here")] if rank() == full else None
            with mock.patch.object(BackgroundSaves, "_copy_all", side_effect=lacking):
                run = trainer(GeminiStrategy(**BACKGROUND), callbacks=[save], max_steps=3)
                error = raised(lambda run=run: run.fit(Module(), loader()))
            assert type(error) is (OutOfBudgetError if rank() == full else CheckpointError), error
            assert "no room here" in str(error)
            assert run.global_step == 2
        assert not (folder / "a").exists()


def newest(folder: Path) -> ModelCheckpoint:
    """Keeps the checkpoint of the last step alone."""
    return ModelCheckpoint(folder, "{step}", monitor="step", mode="max", every_n_train_steps=1, save_top_k=1)


def complete(folder: Path) -> list[str]:
    """The names of what is a checkpoint by now."""
    return sorted(path.name for path in folder.iterdir() if (path / MANIFEST_NAME).exists())


@scenario
def an_older_checkpoint_goes_when_the_newer_one_is_there() -> None:
    with shared_folder() as folder, held_back(after=1) as gate:
        seen: list[Any] = []

        def look(_: L.Trainer) -> None:
            seen.append(complete(folder))
            gate.open()

        saver = newest(folder)
        run = trainer(
            GeminiStrategy(**BACKGROUND), callbacks=[saver, Calls(step_3=look)], enable_checkpointing=True, max_steps=3
        )
        run.fit(Module(), loader())
        assert seen == [["step=1.ckpt"]]
        assert complete(folder) == ["step=3.ckpt"] == [path.name for path in folder.iterdir()]
        assert step_of(Path(saver.best_model_path)) == 3
    with shared_folder() as folder, full_disk() as fill:

        def one_is_there(run: L.Trainer) -> None:
            run.strategy._checkpoints.wait()
            fill()

        callbacks = [newest(folder), Calls(step_2=one_is_there)]
        run = trainer(GeminiStrategy(**BACKGROUND), callbacks=callbacks, enable_checkpointing=True, max_steps=4)
        assert isinstance(raised(lambda: run.fit(Module(), loader())), CheckpointWriteError)
        assert [path.name for path in folder.iterdir()] == ["step=1.ckpt"]
        assert step_of(folder / "step=1.ckpt") == 1


@scenario
def the_last_and_the_best_are_found_again() -> None:
    for settings in (STRATEGIES["kept"], BACKGROUND):
        with shared_folder() as folder:
            best = ModelCheckpoint(folder / "best", "{step}", monitor="step", mode="min", every_n_train_steps=2)
            last = ModelCheckpoint(folder / "last", "{step}", every_n_train_steps=2, save_top_k=-1, save_last="link")
            note = Note()
            run = trainer(
                GeminiStrategy(**settings), callbacks=[best, last, note], enable_checkpointing=True, max_steps=5
            )
            run.fit(Module(), loader())
            assert (folder / "last/last.ckpt").is_symlink()
            assert step_of(folder / "last/last.ckpt") == 4
            assert complete(folder / "best") == ["step=2.ckpt"]
            run.fit_loop.epoch_loop.max_steps = 6
            for path, step in (("last", 4), ("best", 2)):
                seen: list[int] = []
                run.callbacks.append(Begins(seen))
                run.fit(Module(), loader(), ckpt_path=path)
                assert seen == [step]
                run.callbacks.pop()


class Begins(Callback):
    """Notes the step at which a run begins."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(trainer.global_step)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("run", SCENARIOS, ids=lambda run: run.__name__)
def test_scenario(run: Callable[[], None], world_size: int) -> None:
    check(run, SCENARIOS, world_size)
