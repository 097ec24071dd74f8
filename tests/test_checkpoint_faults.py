"""A save that is killed, fails or loses power leaves the old checkpoint or the new one, and no leftovers for long."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_gemini.checkpoint import remove
from lightning_gemini.checkpoint.operations import Operations
from lightning_gemini.core.errors import CheckpointError, CheckpointWriteError
from tests.faults import Disk, Failing, Killing, Watched, installed
from tests.forked import in_child, was_killed
from tests.generations import clean, generation_at, listing, save_generation
from tests.ranks import run_ranks

#: What is at the path when the save begins: nothing; a checkpoint; one, and what a killed save has left.
BEGINNINGS = ["nothing", "checkpoint", "leftovers"]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system in memory, where there is one: thousands of fsyncs are not what is tested here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def begin(path: Path, beginning: str) -> int | None:
    """Makes the beginning; the generation that is at the path then. Beside it there is always another checkpoint."""
    save_generation(path.parent / "beside", 7)
    if beginning == "nothing":
        return None
    save_generation(path, 1)
    if beginning == "leftovers":
        (old,) = (entry for entry in path.iterdir() if entry.is_dir())
        shutil.copytree(old, path / "20200101T000000000000-0123abcd")
        (path / "checkpoint.json.20200101T000000000000-0123abcd").write_text("{")
        (path / ".lock").write_text('{"host": "gone", "pid": 1}')
    return 1


def copied(base: Path, work: Path) -> Path:
    """The path of a checkpoint in a fresh copy of ``base``."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    return work / "c"


def operations_of(work: Callable[[], None]) -> list[str]:
    watched = Watched()
    with installed(watched):
        work()
    return [name for name, _ in watched.log]


def last_of(names: list[str], name: str) -> int:
    return len(names) - 1 - names[::-1].index(name)


def part_that_differs(names: list[str], beginning: str) -> list[str]:
    """Leftovers change how a save begins; from where it makes its folder it goes on as one that has found none."""
    return names[: names.index("mkdir")] if beginning == "leftovers" else names


def check_after_kill(path: Path, old: int | None) -> int | None:
    """Old or new is there; a next save works, and leaves nothing lying about. Returns which it was."""
    found = generation_at(path)
    assert found in (old, 2)
    assert generation_at(path.parent / "beside") == 7
    save_generation(path, 3)
    assert generation_at(path) == 3
    assert listing(path) == clean(1)
    return found


def check_order(found: list[int | None], old: int | None) -> None:
    """There is one moment of the commit: the old generation before it, the new one after."""
    assert found[0] == old
    assert found == sorted(found, key=lambda generation: generation == 2)


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_save_that_is_killed_at_any_operation(beginning: str, memory: Path) -> None:
    base, work = memory / "base", memory / "work"
    old = begin(base / "c", beginning)
    names = operations_of(lambda: save_generation(copied(base, work), 2))
    assert len(names) > 30
    found = []
    for number, name in enumerate(part_that_differs(names, beginning)):
        for half in [False, True] if name == "write" else [False]:
            path = copied(base, work)
            with installed(Killing(number, half)):
                pid = in_child(lambda path=path: save_generation(path, 2))
            assert was_killed(pid)
            found.append(check_after_kill(path, old))
    check_order(found, old)
    assert found[-1] == (old if beginning == "leftovers" else 2)


def as_rank(rank: int, store: Path, work: Callable[[dist.ProcessGroup], None]) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    work(dist.group.WORLD)


def two_ranks_killed(path: Path, victim: int, number: int) -> None:
    """Saves on two ranks, of which one is killed at an operation and then the other, as a scheduler of jobs does."""
    store = path.parent / "store"
    pids = []
    for rank in range(2):
        with installed(Killing(number, half=True) if rank == victim else Watched()):
            pids.append(in_child(lambda rank=rank: as_rank(rank, store, lambda group: save_generation(path, 2, group))))
    assert was_killed(pids[victim])
    os.kill(pids[1 - victim], signal.SIGKILL)
    os.waitpid(pids[1 - victim], 0)


def log_of_two_ranks(path: str) -> list[str]:
    return operations_of(lambda: save_generation(Path(path), 2, dist.group.WORLD))


@pytest.mark.parametrize("beginning", ["nothing", "checkpoint"])
def test_a_save_of_two_ranks_of_which_one_is_killed_at_any_operation(beginning: str, memory: Path) -> None:
    base, work = memory / "base", memory / "work"
    old = begin(base / "c", beginning)
    logs = run_ranks(log_of_two_ranks, 2, str(copied(base, work)))
    assert len(logs[1]) > 5
    for victim, names in enumerate(logs):
        found = []
        # until rank 0 has made the folder of the save the other does nothing: the test above has been there
        first = 0 if victim else last_of(names, "mkdir")
        for number in range(first, len(names)):
            path = copied(base, work)
            two_ranks_killed(path, victim, number)
            found.append(check_after_kill(path, old))
        if victim == 0:
            check_order(found, old)
        else:
            assert set(found) == {old}  # rank 0 waits for the last operation of every other rank


def failed_save(path: Path, operations: Watched, group: dist.ProcessGroup | None = None) -> str | None:
    """What a save of generation 2 says if it fails, with the number of the system's error; ``None`` if it does not."""
    with installed(operations):
        try:
            save_generation(path, 2, group)
        except CheckpointWriteError as error:
            cause = error.__cause__
            return f"{cause.errno if isinstance(cause, OSError) else cause} {error}"
    return None


def is_after_commit(names: list[str], number: int) -> bool:
    """Whether only the removal of old files and of the lock are left: the new checkpoint is on the disk."""
    commit = names.index("replace")
    return number > names.index("fsync", commit) + 1


def is_removal_before(names: list[str], number: int) -> bool:
    """Whether the operation belongs to the removal of leftovers with which a save begins."""
    return "unlink" in names[: names.index("mkdir")] and names.index("lock") + 2 < number < names.index("mkdir")


@pytest.mark.filterwarnings("ignore:old files in")
@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("number_of_error", [errno.ENOSPC, errno.EIO])
def test_a_save_of_which_an_operation_fails(number_of_error: int, beginning: str, memory: Path) -> None:
    base, work = memory / "base", memory / "work"
    old = begin(base / "c", beginning)
    names = operations_of(lambda: save_generation(copied(base, work), 2))
    for number, name in enumerate(part_that_differs(names, beginning)):
        path = copied(base, work)
        said = failed_save(path, Failing(number, number_of_error))
        if is_after_commit(names, number) or is_removal_before(names, number):
            assert said is None, (number, name)
            assert generation_at(path) == 2
        else:
            assert said is not None, (number, name)
            assert said.startswith(f"{number_of_error} {path} could not be saved: [Errno {number_of_error}]")
            assert generation_at(path) == old
            lock = [".lock"] if name == "lock" else []  # nobody knows whose it is
            if old is None:
                assert not path.exists() if not lock else os.listdir(path) == lock
            elif beginning == "checkpoint":
                assert listing(path) == [*lock, *clean(1)]
        check_after_kill(path, old)


def two_ranks_with_failures(root: str, beginning: str) -> list[tuple[int, str, str | None]]:
    """For every operation of each rank a save in which it fails, and one after it that works; what was said."""
    warnings.filterwarnings("ignore", "old files in")
    group, rank = dist.group.WORLD, dist.get_rank()
    base, path = Path(root, "base"), Path(root, "work", "c")
    old = 1 if beginning == "checkpoint" else None
    if rank == 0:
        begin(base / "c", beginning)
        copied(base, path.parent)
    dist.barrier()
    counts: list[list[str]] = [[], []]
    dist.all_gather_object(counts, operations_of(lambda: save_generation(path, 2, group)))
    outcomes = []
    for victim, names in enumerate(counts):
        for number in range(len(names)):
            if rank == 0:
                copied(base, path.parent)
            dist.barrier()
            error = errno.ENOSPC if number % 2 else errno.EIO
            said = failed_save(path, Failing(number, error) if rank == victim else Watched(), group)
            both: list[str | None] = [None, None]
            dist.all_gather_object(both, said)
            assert both[0] == both[1], both
            late = victim == 0 and is_after_commit(names, number)
            assert (said is None) == late
            assert late or f"rank {victim}: [Errno {error}]" in said
            if rank == 0:
                assert generation_at(path) == (2 if late else old)
                assert generation_at(path.parent / "beside") == 7
            dist.barrier()
            save_generation(path, 3, group)
            if rank == 0:
                assert generation_at(path) == 3
                assert listing(path) == clean(2)
            outcomes.append((victim, names[number], said))
    return outcomes


@pytest.mark.parametrize("beginning", ["nothing", "checkpoint"])
def test_a_save_of_two_ranks_of_which_an_operation_fails(beginning: str, memory: Path) -> None:
    outcomes = run_ranks(two_ranks_with_failures, 2, str(memory), beginning)[0]
    assert {name for victim, name, said in outcomes if victim == 1 and said} == {"open", "write", "fsync", "close"}
    assert len([said for victim, _, said in outcomes if victim == 0 and said]) > 20


@pytest.mark.filterwarnings("ignore:old files in")
@pytest.mark.parametrize("beginning", ["nothing", "checkpoint"])
def test_a_disk_that_fails_and_goes_on_failing(beginning: str, memory: Path) -> None:
    base, work = memory / "base", memory / "work"
    old = begin(base / "c", beginning)
    names = operations_of(lambda: save_generation(copied(base, work), 2))
    found = []
    for number in range(len(names)):
        path = copied(base, work)
        said = failed_save(path, Failing(number, errno.EIO, lasting=True))
        found.append(generation_at(path))
        if said is not None and found[-1] == 2:
            # it could not be taken back: nobody is told otherwise
            assert "The new checkpoint is in place" in said
        assert (said is None) == is_after_commit(names, number)
        check_after_kill(path, old)
    check_order(found, old)


class LosingPower(Disk):
    """Looks before every operation at what would be left if power were lost now.

    Attributes:
        stop_after: a name; once an operation of it is done, none does anything, as if the process had been killed.
        found: the generations that were left.
    """

    def __init__(self, root: Path, allowed: set[int | None]) -> None:
        super().__init__(root)
        self.allowed, self.found = allowed, set[int | None]()
        self.stop_after, self.stopped = "", False
        self._left, self._rng = root.parent / "left", random.Random(0)

    def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
        if self.stopped and name not in ("close", "unlock"):
            raise OSError(errno.EIO, "the process is no more")
        self.look(index, name)
        self.stopped = self.stopped or name == self.stop_after
        return super().at(index, name, args)

    def look(self, index: int = 0, name: str = "the end") -> None:
        for _ in range(8):
            self.after_loss(self._left, self._rng)
            generation = generation_at(self._left / "c") if (self._left / "c").exists() else None
            assert generation in self.allowed, (index, name)
            self.found.add(generation)
            assert generation_at(self._left / "beside") == 7
            shutil.rmtree(self._left)


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_loss_of_power_at_any_operation(beginning: str, memory: Path) -> None:
    old = begin(memory / "work" / "c", beginning)
    disk = LosingPower(memory / "work", {old, 2})
    with installed(disk):
        save_generation(memory / "work" / "c", 2)
    assert disk.found == {old, 2}
    disk.allowed = {2}  # when the save returns, the new checkpoint is there for good
    disk.look()


@pytest.mark.filterwarnings("ignore:old files in")
@pytest.mark.parametrize("last", ["mkdir", "replace"])
@pytest.mark.parametrize("beginning", ["nothing", "checkpoint"])
def test_a_loss_of_power_in_a_save_after_one_that_was_killed(beginning: str, last: str, memory: Path) -> None:
    path = memory / "work" / "c"
    old = begin(path, beginning)
    disk = LosingPower(memory / "work", {old, 2, 3})
    disk.stop_after = last
    with installed(disk):
        assert failed_save(path, disk)
        disk.stopped, disk.stop_after = False, ""
        save_generation(path, 3)
    assert {old, 3} <= disk.found
    disk.allowed = {3}
    disk.look()


@pytest.mark.parametrize("beginning", ["nothing", "checkpoint"])
def test_a_loss_of_power_when_nobody_knows_what_the_disk_has(beginning: str, memory: Path) -> None:
    path = memory / "work" / "c"
    old = begin(path, beginning)

    class Doubtful(LosingPower):
        """Neither the new manifest nor, when it is taken back, the old one can be synchronised."""

        def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
            renamed = "replace" in [name for name, _ in self.log]
            if name == "fsync" and renamed and self._open[args[0]] is self._tree.entries["c"]:
                raise OSError(errno.EIO, "fsync failed")
            return super().at(index, name, args)

    disk = Doubtful(memory / "work", {old, 2})
    said = failed_save(path, disk)
    assert said is not None
    assert generation_at(path) == old
    disk.look()
    assert disk.found == {old, 2}
    save_generation(path, 3)
    assert listing(path) == clean(1)


def test_a_loss_of_power_in_a_removal(memory: Path) -> None:
    begin(memory / "work" / "c", "checkpoint")
    disk = LosingPower(memory / "work", {1, None})
    with installed(disk):
        remove(memory / "work" / "c")
    assert disk.found == {1, None}


def test_an_interrupt_at_any_operation(memory: Path) -> None:
    base, work = memory / "base", memory / "work"
    old = begin(base / "c", "checkpoint")
    names = operations_of(lambda: save_generation(copied(base, work), 2))

    class Interrupting(Failing):
        def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
            result = Operations.__dict__[name](self, *args)
            if index == self.number:
                raise KeyboardInterrupt
            return result

    found = []
    for number in range(len(names)):
        path = copied(base, work)
        with installed(Interrupting(number, 0)), pytest.raises(KeyboardInterrupt):
            save_generation(path, 2)
        found.append(generation_at(path))
        check_after_kill(path, old)
    check_order(found, old)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_outlives_another_one(victim: int, memory: Path) -> None:
    path = memory / "c"
    begin(path, "checkpoint")

    def survive(group: dist.ProcessGroup) -> None:
        with pytest.raises(CheckpointWriteError, match="The ranks have lost each other") as error:
            save_generation(path, 2, group)
        if victim == 1:
            assert "The checkpoint from before is in place" in str(error.value)
            assert listing(path) == clean(1)

    pids = []
    for rank in range(2):
        if rank == victim:
            with installed(Killing(2, half=True)):
                work = lambda group: save_generation(path, 2, group)  # noqa: E731
                pids.append(in_child(lambda rank=rank, work=work: as_rank(rank, memory / "store", work)))
        else:
            pids.append(in_child(lambda rank=rank: as_rank(rank, memory / "store", survive)))
    assert was_killed(pids[victim])
    assert os.waitpid(pids[1 - victim], 0)[1] == 0
    check_after_kill(path, 1)


# Two writers


def test_a_second_writer_is_refused_by_name(memory: Path) -> None:
    path = memory / "c"
    begin(path, "checkpoint")
    ready, go = os.pipe(), os.pipe()

    class Waiting(Watched):
        def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
            if name == "replace":
                os.write(ready[1], b"x")
                os.close(go[1])
                os.read(go[0], 1)  # or the end of the test
            return super().at(index, name, args)

    with installed(Waiting()):
        pid = in_child(lambda: save_generation(path, 2))
    os.close(ready[1])
    assert os.read(ready[0], 1)
    named = rf"process {pid} on {socket.gethostname()} is at work in {path} \(saving \w+-\w+\)"
    for attempt in (lambda: save_generation(path, 3), lambda: remove(path)):
        with pytest.raises(CheckpointError, match=named):
            attempt()
    assert generation_at(path) == 1
    os.write(go[1], b"x")
    assert os.waitpid(pid, 0)[1] == 0
    assert generation_at(path) == 2
    assert listing(path) == clean(1)


def test_a_lock_whose_holder_is_gone_but_not_its_children(memory: Path) -> None:
    path = memory / "c"
    end = os.pipe()

    class Forking(Watched):
        def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
            if name == "replace":
                if os.fork() == 0:
                    os.close(end[1])
                    os.read(end[0], 1)
                    os._exit(0)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().at(index, name, args)

    with installed(Forking()):
        pid = in_child(lambda: save_generation(path, 2))
    assert was_killed(pid)
    with pytest.raises(CheckpointWriteError, match=rf"process {pid} on .*, which is gone, .* End that one"):
        save_generation(path, 3)
    os.write(end[1], b"x")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(CheckpointWriteError):
            save_generation(path, 3)
            break
    assert generation_at(path) == 3


class WithoutLocks(Watched):
    """A file system that has no locks; ``between`` is done once, before operation number ``number``."""

    def __init__(self, number: int = -1, between: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.number, self.between = number, between

    def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
        if index == self.number:
            self.between()
        if name in ("lock", "unlock"):
            self.no_lock()
            return None
        return super().at(index, name, args)

    def no_lock(self) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")


class LocksOfOneHost(WithoutLocks):
    """A file system on which every machine has its own locks: nobody ever holds another one's."""

    def no_lock(self) -> None:
        pass


@pytest.mark.parametrize("disk", [WithoutLocks, LocksOfOneHost])
@pytest.mark.parametrize("beginning", ["nothing", "checkpoint"])
def test_a_second_writer_is_found_without_a_lock(beginning: str, disk: type[WithoutLocks], memory: Path) -> None:
    base, work = memory / "base", memory / "work"
    begin(base / "c", beginning)
    names = operations_of(lambda: save_generation(copied(base, work), 2))

    def other() -> None:
        with installed(disk()):
            save_generation(path, 3)

    begun = last_of(names, "mkdir") + 1
    # between the last look and the replacement nobody can tell
    for number in range(names.index("replace")):
        path = copied(base, work)
        said = failed_save(path, disk(number, other))
        assert generation_at(path) == (2 if said is None else 3)
        assert listing(path) == clean(1)
        assert said is not None or number <= begun
        if said is not None:
            found_by_name = f"process {os.getpid()} on {socket.gethostname()} has saved a checkpoint there since this"
            assert found_by_name in said or (disk is LocksOfOneHost and "All ranks have to share" in said)


def test_a_lock_that_is_let_go_while_another_takes_it(memory: Path) -> None:
    path = memory / "c"
    begin(path, "checkpoint")
    refused = []

    class Racing(Watched):
        def at(self, index: int, name: str, args: tuple[Any, ...]) -> Any:
            if name == "lock" and not refused:
                refused.append("")
                (path / ".lock").unlink()  # as its holder does, after this one has opened it
            if name == "replace":
                refused.append(failed_save(path, Watched()))
            return super().at(index, name, args)

    assert failed_save(path, Racing()) is None
    assert "is at work in" in refused[1]
    assert generation_at(path) == 2


def test_files_that_are_gone_before_the_commit(memory: Path) -> None:
    path = memory / "c"
    begin(path, "checkpoint")
    names = operations_of(lambda: save_generation(path, 1))
    (old,) = (entry for entry in path.iterdir() if entry.is_dir())

    def sweep() -> None:  # what another machine does that knows nothing of this save
        for entry in path.iterdir():
            if entry.is_dir() and entry != old:
                shutil.rmtree(entry)

    said = failed_save(path, WithoutLocks(names.index("replace") - 1, sweep))
    assert "All ranks have to share" in said
    assert generation_at(path) == 1
    assert listing(path) == clean(1)


def test_the_files_of_a_damaged_manifest_stay_until_there_is_another(memory: Path) -> None:
    path = memory / "c"
    begin(path, "checkpoint")
    names = operations_of(lambda: save_generation(path, 1))
    sound = (path / "checkpoint.json").read_bytes()
    (path / "checkpoint.json").write_bytes(sound[:-1] + b"!")
    assert failed_save(path, Failing(names.index("replace") - 1, errno.EIO))
    (path / "checkpoint.json").write_bytes(sound)
    assert generation_at(path) == 1
    (path / "checkpoint.json").write_bytes(sound[:-1] + b"!")
    save_generation(path, 3)
    assert listing(path) == clean(1)


def test_a_checkpoint_that_is_removed_meanwhile(memory: Path) -> None:
    path = memory / "c"
    begin(path, "checkpoint")
    names = operations_of(lambda: save_generation(path, 1))

    def other() -> None:
        with installed(LocksOfOneHost()):
            remove(path)

    said = failed_save(path, LocksOfOneHost(names.index("replace") - 1, other))
    assert said is not None
    assert generation_at(path) is None
    save_generation(path, 3)
    assert listing(path) == clean(1)


# Removals


def test_a_removal_that_is_killed_or_fails_at_any_operation(memory: Path) -> None:
    base, work = memory / "base", memory / "work"
    begin(base / "c", "leftovers")
    names = operations_of(lambda: remove(copied(base, work)))
    assert len(names) > 12
    found = []
    for number in range(len(names)):
        path = copied(base, work)
        with installed(Killing(number, half=True)):
            pid = in_child(lambda path=path: remove(path))
        assert was_killed(pid)
        found.append(generation_at(path))
        if path.exists() and os.listdir(path):
            remove(path)
        assert not path.exists() or not os.listdir(path)
        path = copied(base, work)
        with installed(Failing(number, errno.EIO)), contextlib.suppress(CheckpointError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            remove(path)
        assert generation_at(path) in (1, None)
    assert found == sorted(found, key=lambda generation: generation is None)
    assert {1, None} == set(found)
