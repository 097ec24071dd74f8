"""Runs a function on several ranks: processes forked from a server that has done the slow imports once."""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


class RankError(AssertionError):
    """What the ranks said when they failed."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Calls ``function(*args)`` on each rank inside an initialised gloo group and returns the results by rank.

    ``function`` must be importable and ``args`` and results must pickle. If a rank raises, dies or is not done in
    time, all are killed and :class:`RankError` carries every traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank_main, args=(rank, world_size, folder, theirs, function, args))
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        try:
            return _collect(ends, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(0.5)
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
                process.join()


def _collect(ends: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    open_ends = {end: rank for rank, end in enumerate(ends)}
    while open_ends:
        ready = wait(list(open_ends), timeout=max(0.0, deadline - time.monotonic()) if not failures else 2.0)
        if not ready:
            failures.append(f"ranks {sorted(open_ends.values())} did not end" + (" in time" if not failures else ""))
            break
        for end in ready:
            rank = open_ends.pop(end)  # type: ignore[arg-type]
            try:
                ok, value = torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)  # type: ignore[union-attr]
            except EOFError:
                ok, value = False, "died without a word"
            if ok:
                results[rank] = value
            else:
                failures.append(f"--- rank {rank} ---\n{value}")
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(ends))]


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    out: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(os.path.join(folder, "store"), world_size),
            rank=rank,
            world_size=world_size,
        )
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    file = io.BytesIO()
    torch.save(result, file)  # not pickle: it would hand tensors over through memory that ends with this process
    out.send_bytes(file.getvalue())
    out.close()
    if result[0]:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)
