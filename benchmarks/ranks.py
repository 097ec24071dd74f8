"""Runs a function on the ranks of a gloo group: processes, forked from a server that has done the imports."""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: A thread that waits for another one spins by default, and on a machine with other work spins away the other's core.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

_GRACE_SECONDS = 5.0


class RankError(RuntimeError):
    """What the ranks said when they failed."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    threads: int,
    *args: Any,
    timeout: float = 3600,
    preload: str = "benchmarks.preload",
) -> list[Any]:
    """Calls ``function(*args)`` on each rank and returns the results by rank.

    Args:
        function: importable; ``args`` and the results must pickle.
        world_size: ranks; one is a group too, for DDP and FSDP2.
        threads: threads that torch computes with, in each.
        timeout: seconds until all of them are killed.
        preload: the module that the server imports before it forks; one for all calls of a process.

    Raises:
        RankError: a rank raised, died or was not done in time; carries the tracebacks.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        before = {key: os.environ.get(key) for key in ENVIRONMENT}
        os.environ.update({key: value for key, value in ENVIRONMENT.items() if before[key] is None})
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                job = (rank, world_size, threads, folder, theirs, function, args)
                process = context.Process(target=_rank_main, args=job, daemon=True)
                process.start()
                theirs.close()
                ends.append(ours)
                processes.append(process)
            return _collect(ends, time.monotonic() + timeout)
        finally:
            for key in ENVIRONMENT:
                if before[key] is None:
                    os.environ.pop(key, None)
            for process in processes:
                process.join(_GRACE_SECONDS)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(ends: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {end: rank for rank, end in enumerate(ends)}
    while waiting:
        # once one has failed the others hang in a collective: they get the time to say what they saw, no more
        left = _GRACE_SECONDS if failures else max(0.0, deadline - time.monotonic())
        ready = wait(list(waiting), timeout=left)
        if not ready:
            failures.append(f"ranks {sorted(waiting.values())} did not end")
            break
        for end in ready:
            rank = waiting.pop(end)  # type: ignore[arg-type]
            try:
                done, value = torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)  # type: ignore[union-attr]
            except EOFError:
                done, value = False, "died without a word"
            if done:
                results[rank] = value
            else:
                failures.append(f"--- rank {rank} ---\n{value}")
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(ends))]


def _rank_main(
    rank: int,
    world_size: int,
    threads: int,
    folder: str,
    out: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    try:
        store = dist.FileStore(str(Path(folder, "store")), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        outcome = (True, function(*args))
        dist.barrier()
    except BaseException:
        outcome = (False, traceback.format_exc())
    file = io.BytesIO()
    torch.save(outcome, file)  # not pickle: it would hand tensors over through memory that ends with this process
    out.send_bytes(file.getvalue())
    out.close()
    # gloo's threads and whatever the contenders left behind need no orderly end
    os._exit(0)
