"""Ranks that wait for each other in vain: every one of them ends, and says where it stood."""

from __future__ import annotations

import gc
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_gemini import GeminiStrategy
from lightning_gemini.core import Engine, Home, shard
from lightning_gemini.core.collectives import Collectives, _timeout_seconds
from lightning_gemini.core.hang import Hang
from lightning_gemini.core.host_updates import HostUpdates
from lightning_gemini.core.peers import Board
from lightning_gemini.core.pulse import Pulse
from lightning_gemini.core.watchdog import Watchdog
from lightning_gemini.ranks import end_processes
from tests.lightning_cases import Module, loader, on_ranks, trainer
from tests.ranks import RankError, run_ranks

TIMEOUT = 4.0
RANKS = 3
SLACK = 4.0  # a busy machine, and the moment that a closed connection waits for words


class Layers(nn.Sequential):
    """A chunk for each layer; one can be left out."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
        self.skip = -1

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self):
            x = x if number == self.skip else layer(x)
        return x


def _engine(folder: Path, home: Home) -> tuple[Layers, torch.optim.Optimizer, Engine]:
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group, reduces = (dist.new_group(timeout=timedelta(seconds=TIMEOUT)) for _ in range(2))
    settings = {"chunk_size": 1152, "prefetch": 1, "hang_folder": folder}
    return model, optimizer, shard(model, [optimizer], group=group, reduce_group=reduces, home=home, **settings)


def _evaluate(model: nn.Module, engine: Engine) -> None:
    with torch.no_grad(), engine.forward("an evaluation"):
        model(torch.ones(2, 32))


def _train(model: nn.Module, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    with engine.forward("training"):
        loss = model(torch.ones(2, 32)).sum()
    with engine.backward():
        loss.backward()
    optimizer.step()


# What rank 1 does differently; each is called on all ranks, with an engine of its own


def leaves_the_evaluation_early(rank: int, model: Layers, engine: Engine, _: torch.optim.Optimizer) -> None:
    for _ in range(4):
        _evaluate(model, engine)
        if rank == 1:
            load_data_for_ever()


def load_data_for_ever() -> None:
    time.sleep(TIMEOUT + 1)


def sleeps_inside_a_step(rank: int, model: Layers, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    if rank == 1:
        model[3].register_forward_pre_hook(lambda *_: load_data_for_ever())
    _train(model, engine, optimizer)


def skips_the_last_unit_in_evaluation(rank: int, model: Layers, engine: Engine, _: torch.optim.Optimizer) -> None:
    model.skip = 5 if rank == 1 else -1
    _evaluate(model, engine)
    engine.sync_buffers()
    engine.store.collectives.gather_objects(rank)


def skips_a_unit_in_an_unrecorded_step(rank: int, model: Layers, engine: Engine, opt: torch.optim.Optimizer) -> None:
    model.skip = 1 if rank == 1 else -1
    _train(model, engine, opt)


def steps_without_a_backward(rank: int, model: Layers, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    if rank == 1:
        optimizer.step()
    _train(model, engine, optimizer)


def raises_inside_an_evaluation(rank: int, model: Layers, engine: Engine, _: torch.optim.Optimizer) -> None:
    if rank == 1:
        model[3].register_forward_pre_hook(_fail)
    _evaluate(model, engine)


def _fail(*_: Any) -> None:
    raise ValueError("the cat walked over the keyboard")


def takes_long_but_not_too_long(rank: int, model: Layers, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    slow = model[3].register_forward_pre_hook(lambda *_: time.sleep(TIMEOUT / 2) if rank == 1 else None)
    _train(model, engine, optimizer)
    slow.remove()
    time.sleep(TIMEOUT)  # all ranks, between steps
    _evaluate(model, engine)


CASES: list[tuple[Callable[..., None], Home]] = [
    (leaves_the_evaluation_early, Home.HOST),
    (sleeps_inside_a_step, Home.HOST),
    (skips_the_last_unit_in_evaluation, Home.HOST),
    (skips_a_unit_in_an_unrecorded_step, Home.HOST),
    (steps_without_a_backward, Home.FULL),
    (raises_inside_an_evaluation, Home.HOST),
    (takes_long_but_not_too_long, Home.HOST),
]


def _hang_in_turn(root: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for case, home in CASES:
        folder = root / case.__name__
        model, optimizer, engine = _engine(folder, home)
        began = time.monotonic()
        try:
            case(dist.get_rank(), model, engine, optimizer)
            said = "nothing"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            engine.leave(error)
        seconds = time.monotonic() - began
        engine.release(keep_weights=False)
        file = folder / f"gemini_hang-rank{dist.get_rank()}.txt"
        found[case.__name__] = {
            "said": said,
            "seconds": seconds,
            "file": file.read_text() if file.exists() else "",
            "path": str(file),
            "folder": folder.exists(),
        }
        dist.barrier()
    deadline = time.monotonic() + 2 * TIMEOUT
    while (left := _gemini_threads()) and time.monotonic() < deadline:
        time.sleep(0.05)
    found["threads"] = {"left": left}
    return found


def _gemini_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gemini")]


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(_hang_in_turn, RANKS, tmp_path_factory.mktemp("hangs"), timeout=90)


def _of(hung: list[dict[str, dict[str, Any]]], case: Callable[..., None]) -> list[dict[str, Any]]:
    return [found[case.__name__] for found in hung]


TIMED_OUT = [
    leaves_the_evaluation_early,
    sleeps_inside_a_step,
    skips_the_last_unit_in_evaluation,
    steps_without_a_backward,
]


@pytest.mark.parametrize("case", TIMED_OUT)
def test_every_rank_ends_and_leaves_a_file(hung: list[dict[str, dict[str, Any]]], case: Callable[..., None]) -> None:
    for rank, found in enumerate(_of(hung, case)):
        assert found["said"].startswith("PeerError: ")
        assert re.search(r"timed out: rank \d waited \d\.\d s in an? ", found["said"])
        assert "different numbers of batches" in found["said"]
        assert found["said"].endswith(found["path"])
        assert found["seconds"] < TIMEOUT + SLACK
        file = found["file"]
        assert file.startswith(f"rank {rank} of {RANKS}: ")
        assert f"in {case.__name__}\n" in file  # a stack
        for number in range(6):
            assert re.search(rf"^chunk {number}: \w+, home \w+, \d pins, from {number}.weight on$", file, re.M)
            assert re.search(rf"^chunk {number}: (EMPTY|FILLING|READY|REDUCING)", file, re.M)
        assert "memory of chunks" in file
        assert found["said"].removeprefix("PeerError: ") in file
        assert "could not be read" not in file


def test_the_file_says_where_a_step_that_is_followed_has_stopped(hung: list[dict[str, dict[str, Any]]]) -> None:
    waits, sleeps, also = _of(hung, leaves_the_evaluation_early)
    where = r"in an all-gather of chunk \d \(\d.weight\) for [^(]* \(its collective \d+\), inside an evaluation"
    for found in (waits, also):
        assert re.search(where, found["file"])
        assert re.search(r"following: moment \d of 6 by its plan", found["file"])
        assert re.search(r"^chunk \d: COMING", found["file"], re.M)
        assert "rank 1 is in code between steps (data loading" in found["said"]
    assert re.search("There, too: rank [02];", waits["said"])  # whoever ends first ends the others
    assert "in load_data_for_ever" in sleeps["file"]  # what it did while the others waited, not what it came to later
    assert re.match(r"PeerError: rank [02] ended( \(so did rank 2\))?: PeerError: timed out: ", sleeps["said"])


def test_a_rank_that_stops_inside_a_step_is_named_with_its_unit(hung: list[dict[str, dict[str, Any]]]) -> None:
    waits, sleeps, _ = _of(hung, sleeps_inside_a_step)
    assert "rank 1 is inside training, waiting for no other rank; the last unit that needed a chunk: 3" in waits["said"]
    assert re.search(r"recording: moment 4, 3; began", sleeps["file"], re.M)
    assert "in load_data_for_ever" in sleeps["file"]
    assert re.search(r"^chunk 3: COMPUTE, home HOST, 1 pins", sleeps["file"], re.M)


def test_ranks_that_wait_in_different_collectives_name_each_others(hung: list[dict[str, dict[str, Any]]]) -> None:
    waits, skips, _ = _of(hung, skips_the_last_unit_in_evaluation)
    for found in (waits, skips):
        assert re.search(r"rank [02] (is|waited \S+ s) in an all-gather of chunk 5 \(5.weight\) for 5", found["said"])
        assert re.search(r"rank 1 (is|waited \S+ s) in an exchange of objects", found["said"])
    for found in _of(hung, steps_without_a_backward)[:2]:
        assert re.search(r"rank [02] (is|waited \S+ s) in a reduce-scatter of .* of chunk \d", found["said"])
        assert re.search(r"rank 1 (is|waited \S+ s) in an all-reduce of ", found["said"])


def test_what_says_itself_why_it_ended_leaves_no_file(hung: list[dict[str, dict[str, Any]]]) -> None:
    for case, word in (
        (raises_inside_an_evaluation, "ValueError: the cat walked over the keyboard"),
        (skips_a_unit_in_an_unrecorded_step, "DisagreementError: the ranks do not run the same units"),
    ):
        for rank, found in enumerate(_of(hung, case)):
            assert word in found["said"]
            assert found["said"].startswith(word if rank == 1 else f"PeerError: rank 1 failed: {word}")
            assert found["seconds"] < TIMEOUT
            assert not found["folder"]


def test_a_run_that_goes_well_leaves_no_file(hung: list[dict[str, dict[str, Any]]]) -> None:
    for found in _of(hung, takes_long_but_not_too_long):
        assert (found["said"], found["folder"]) == ("nothing", False)


def test_no_thread_is_left(hung: list[dict[str, dict[str, Any]]]) -> None:
    assert [found["threads"]["left"] for found in hung] == [[]] * RANKS


# Under a Trainer


class EndsValidationEarly(Module):
    def on_train_start(self) -> None:
        collectives = self.trainer.strategy.engine.store.collectives
        groups = collectives._gathers, collectives._reduces
        assert [_timeout_seconds(group) for group in groups] == [TIMEOUT] * 2

    def validation_step(self, batch: Any, index: int) -> None:
        if self.trainer.sanity_checking or index == 0 or dist.get_rank() == 0:
            super().validation_step(batch, index)


def _fit(folder: Path) -> None:
    on_ranks()
    strategy = GeminiStrategy("host", chunk_size=1088, timeout_seconds=TIMEOUT)
    trainer(strategy, default_root_dir=folder).fit(EndsValidationEarly(), loader(), loader())


def test_under_a_trainer_the_file_is_in_the_folder_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(_fit, 2, tmp_path / "run", timeout=60)
    said = re.sub(r"\s+", " ", str(raised.value))
    assert "did not end" not in said
    assert re.search(
        r"PeerError: timed out: rank 0 waited \d\.\d s in (an all-gather|the announcement) of chunk \d", said
    )
    assert "rank 1 is in a reduction of values" in said
    files = sorted((tmp_path / "run").glob("gemini_hang*"))
    assert [file.name for file in files] == ["gemini_hang-rank0.txt", "gemini_hang-rank1.txt"]
    assert str(files[0]) in said
    assert "in validation_step" in files[0].read_text()
    assert "inside validation_step" in files[0].read_text()
    assert "in on_validation_epoch_end" in files[1].read_text() or "in reduce" in files[1].read_text()


@pytest.mark.parametrize("deaf", [False, True])
def test_a_process_that_does_not_end_is_ended(deaf: bool) -> None:
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if deaf else ""
    script = f"{ignore}import time; print(flush=True); time.sleep(600)"
    stuck = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    assert stuck.stdout is not None
    with stuck.stdout as out:
        out.readline()
        end_processes([stuck, ended], patience=0.3)
    assert stuck.wait(10) == (-signal.SIGKILL if deaf else -signal.SIGTERM)
    assert ended.wait(10) == 0


def test_what_is_written_down_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    engine = shard(model, [torch.optim.SGD(model.parameters(), lr=0.1)], home=Home.HOST, chunk_size=1152)
    sections = engine.store.collectives.pulse.sections

    class Never:
        def wait(self) -> None:
            raise AssertionError("waited")

        def then(self, _: Callable[[], None]) -> bool:
            return True

    monkeypatch.setattr(HostUpdates, "under_way", (1,))
    with engine.forward():
        model(torch.ones(2, 32)).sum()
        for chunk in engine.store.chunks:
            chunk.deferred = Never()  # an update in the background
        for gradient in engine.optimizers.gradients(None):
            gradient.landing = Never().wait
        texts = {title: section() for title, section in sections.items()}
        for chunk in engine.store.chunks:
            chunk.deferred = None
        for gradient in engine.optimizers.gradients(None):
            gradient.landing = None
    assert set(texts) == {"Step", "Chunks", "Gradients", "Memory"}
    updating = [line for line in texts["Chunks"].splitlines() if "an update is under way" in line]
    assert [line.split(":")[0] for line in updating] == ["chunk 1"]
    assert "on its way to host memory" in texts["Gradients"]


# The watchdog alone


class Words(dict[str, bytes]):
    """A store for boards of ranks in one process."""

    def set(self, key: str, value: str, /) -> None:
        self[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self for key in keys)


class Ranks:
    """Two ranks' pulses and watchdogs, and a clock that is set by hand."""

    def __init__(self, folder: Path, timeout: float = 100.0) -> None:
        self.now = 0.0
        self.folder = folder
        store = Words()
        self.pulses = [Pulse(), Pulse()]
        boards = [Board(store, rank, 2) for rank in range(2)]
        self.hangs = [Hang(self.pulses[r], boards[r], timeout, folder, r) for r in range(2)]
        self.dogs = [Watchdog(self.pulses[r], self.hangs[r], lambda: self.now) for r in range(2)]

    def after(self, seconds: float) -> list[int]:
        """Lets time pass, looks all the while, and returns the ranks that have a file."""
        until = self.now + seconds
        while self.now < until:
            self.now += self.dogs[0].period
            for dog in self.dogs:
                dog.look()
        return [rank for rank in range(2) if self.file(rank).exists()]

    def file(self, rank: int) -> Path:
        return self.folder / f"gemini_hang-rank{rank}.txt"


def test_a_rank_is_stuck_after_nine_tenths_of_the_timeout(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    block = ranks.pulses[0].enter("a gather")
    assert ranks.after(85) == []
    assert ranks.after(10) == [0, 1]  # rank 1 is called, and answers
    assert ranks.file(0).read_text().startswith("rank 0 of 2: no progress for 9")
    assert "rank 0 makes no progress, and has asked" in ranks.file(1).read_text()
    ranks.file(0).unlink()
    ranks.file(1).unlink()
    assert ranks.after(500) == []  # once for each hang
    ranks.pulses[0].leave(block)
    ranks.pulses[0].enter("another one")
    assert ranks.after(80) == []
    assert ranks.after(20) == [0, 1]


def test_progress_and_code_between_steps_are_no_hang(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    assert ranks.after(1000) == []  # nobody is inside a step
    with ranks.pulses[0].step("training"):
        for _ in range(20):
            assert ranks.after(80) == []
            ranks.pulses[0].beats += 1
    assert ranks.after(1000) == []
    with ranks.pulses[0].step("training"):
        ranks.pulses[0].abandon()  # it failed
        assert ranks.after(1000) == []


def test_a_process_that_was_stopped_is_not_stuck(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    with ranks.pulses[0].step("training"):
        ranks.now += 10_000
        assert ranks.after(50) == []
        assert ranks.after(50) == [0, 1]


def test_what_cannot_be_read_does_not_keep_the_rest_from_being_written(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "new" / "folder")
    ranks.pulses[0].sections |= {"Broken": lambda: str(1 // 0), "Whole": lambda: "all is well"}
    ranks.pulses[0].enter("a gather")
    assert ranks.after(100) == [0, 1]
    text = ranks.file(0).read_text()
    assert "== Broken ==\ncould not be read: ZeroDivisionError" in text
    assert "== Whole ==\nall is well" in text
    assert sorted(path.name for path in ranks.folder.iterdir()) == [ranks.file(r).name for r in range(2)]


def test_a_folder_that_cannot_be_written_to_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    ranks = Ranks(tmp_path / "file")
    assert ranks.hangs[0].alarm(1.0).endswith(str(tmp_path / "gemini_hang-rank0.txt"))


def test_one_rank_has_no_watchdog() -> None:
    before = _gemini_threads()
    collectives = Collectives()
    collectives.watch()
    assert _gemini_threads() == before


def test_a_watchdog_ends_with_its_owner(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, timeout=1.0)
    before = threading.active_count()
    dog = ranks.dogs[0]
    dog.start()
    assert threading.active_count() == before + 1
    del ranks, dog
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
