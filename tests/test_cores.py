"""Each process takes its part of the cores, and its worker really runs with it."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

from lightning_gemini.core.cores import Claim, HostThreads, share
from tests.ranks import run_ranks
from tests.test_launchers import run


def system(root: Path, nodes: dict[int, str], siblings: dict[int, str] | None = None, quota: str | None = None) -> Path:
    """A machine as /sys describes it.

    Args:
        nodes: by number, their CPUs.
        siblings: by CPU, those that are threads of the same core.
        quota: of the control group.
    """
    for node, cpus in nodes.items():
        folder = root / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    for cpu, others in (siblings or {}).items():
        folder = root / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{others}\n")
    if quota is not None:
        (root / "fs/cgroup").mkdir(parents=True)
        (root / "fs/cgroup/cpu.max").write_text(f"{quota}\n")
    return root


def claims(ranks: int, cpus: range, nodes: tuple[int | None, ...] = (), machine: str = "a") -> list[Claim]:
    return [Claim(machine, tuple(cpus), nodes[rank] if nodes else None) for rank in range(ranks)]


def shares(every: list[Claim], root: Path) -> list[tuple[int, tuple[int, ...] | None]]:
    found = [share(rank, every, root) for rank in range(len(every))]
    return [(one.count, one.cpus) for one in found]


TWO = {0: "0-3", 1: "4-7"}
FIRST, SECOND = (0, 1, 2, 3), (4, 5, 6, 7)


@pytest.mark.parametrize(("ranks", "count"), [(1, 8), (2, 4), (3, 2), (4, 2), (5, 1), (8, 1), (9, 1)])
def test_one_node(tmp_path: Path, ranks: int, count: int) -> None:
    assert shares(claims(ranks, range(8)), system(tmp_path, {0: "0-7"})) == [(count, None)] * ranks


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert shares(claims(2, range(6)), tmp_path) == [(3, None)] * 2


def test_a_node_without_cpus_and_one_that_the_process_may_not_use(tmp_path: Path) -> None:
    root = system(tmp_path, {0: "0-3", 1: "4-7", 2: ""})
    assert shares(claims(2, range(4)), root) == [(2, None)] * 2


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, [(8, None)]),
        (2, [(4, FIRST), (4, SECOND)]),
        (3, [(2, FIRST), (2, FIRST), (4, SECOND)]),
        (4, [(2, FIRST), (2, FIRST), (2, SECOND), (2, SECOND)]),
    ],
)
def test_two_nodes(tmp_path: Path, ranks: int, expected: list[tuple[int, tuple[int, ...] | None]]) -> None:
    assert shares(claims(ranks, range(8)), system(tmp_path, TWO)) == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ((1, 0), [(4, SECOND), (4, FIRST)]),
        ((1, 1), [(2, SECOND), (2, SECOND)]),
        ((1, None), [(2, SECOND), (2, SECOND)]),
        ((7, 0), [(2, FIRST), (2, FIRST)]),  # a node that has no CPU of ours
    ],
)
def test_nodes_of_devices(
    tmp_path: Path, nodes: tuple[int | None, ...], expected: list[tuple[int, tuple[int, ...]]]
) -> None:
    assert shares(claims(2, range(8), nodes), system(tmp_path, TWO)) == expected


def test_hardware_threads_are_no_cores(tmp_path: Path) -> None:
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    root = system(tmp_path, {0: "0,1,4,5", 1: "2,3,6,7"}, siblings)
    assert shares(claims(1, range(8)), root) == [(4, None)]
    assert shares(claims(2, range(8)), root) == [(2, (0, 1, 4, 5)), (2, (2, 3, 6, 7))]
    assert str(share(0, claims(2, range(8)), root)) == "2 threads on CPUs 0-1,4-5"
    assert str(HostThreads(1)) == "1 thread"


def test_a_launcher_that_binds_each_rank(tmp_path: Path) -> None:
    bound = [*claims(1, range(4)), *claims(1, range(4, 8))]
    assert shares(bound, system(tmp_path, {0: "0-7"})) == [(4, None)] * 2


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 4), ("400000 100000", 2), ("100000 100000", 1), ("50000 100000", 1), ("6400000 100000", 4)],
)
def test_a_container(tmp_path: Path, quota: str, expected: int) -> None:
    root = system(tmp_path, TWO, quota=quota)
    assert [count for count, _ in shares(claims(2, range(8)), root)] == [expected] * 2
    bound = [*claims(1, range(4)), *claims(1, range(4, 8))]  # they share the quota all the same
    assert [count for count, _ in shares(bound, root)] == [expected] * 2


def test_two_machines(tmp_path: Path) -> None:
    every = [*claims(1, range(4)), *claims(3, range(4), machine="b")]
    assert [count for count, _ in shares(every, system(tmp_path, {0: "0-3"}))] == [4, 1, 1, 1]


def test_one_machine_with_a_launcher_that_allows_one_thread() -> None:
    """The worker takes its own number; this thread and later ones keep the launcher's."""
    script = textwrap.dedent("""
        import json, threading
        import torch
        from tests.background import before_updates, built, train
        seen, later = [], []
        with before_updates(lambda _: seen.append(torch.get_num_threads())):
            engine, optimizer = built()
            for step in range(2):
                train(engine, optimizer, step)
            thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            engine.release()
        print(json.dumps([engine.store.host_updates.threads.count, sorted(set(seen)), later, torch.get_num_threads()]))
    """)
    count, seen, later, own = json.loads(run(sys.executable, "-c", script, OMP_NUM_THREADS="1"))
    assert count == share(0, [Claim("", tuple(sorted(os.sched_getaffinity(0))), None)]).count
    assert (seen, later, own) == ([count], [1], 1)


def _threads_of_a_rank() -> tuple[int, int]:
    from tests.background import built
    from tests.outcomes import group

    threads = built(group=group())[0].store.host_updates.threads
    return threads.count, threads.processes


def test_two_ranks_take_half_of_the_cores_each() -> None:
    whole = share(0, [Claim("", tuple(sorted(os.sched_getaffinity(0))), None)]).count
    assert run_ranks(_threads_of_a_rank, 2) == [(max(1, whole // 2), 2)] * 2
