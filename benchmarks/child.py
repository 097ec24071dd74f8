"""A function in a process of its own, whose end, whatever it is, is a value."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import pickle
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.result import Record

#: The module that the server of processes imports once, so that each starts at once.
PRELOAD = "benchmarks.preload_gpu"

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 20.0  # for a process that has said all and only has to give its memory back
_SHORT = 160  # characters of an error that a table can hold


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        value: what the function returned, ``None`` if it did not.
        said: what it had said before, the latest of each key.
        error: why there is no value, in a line; ``None`` if there is one.
        details: the whole error.
        host_peak: the most bytes of host memory that were resident in its process, as far as the system tells.
        seconds: from the start to the end.
    """

    value: Any
    said: Record = field(default_factory=dict)
    error: str | None = None
    details: str = ""
    host_peak: int = 0
    seconds: float = 0.0


def run_child(
    function: Callable[..., Any], *args: Any, timeout: float, threads: int, preload: str = PRELOAD
) -> Outcome:
    """Calls ``function(say, *args)`` in a new process and waits for it; never raises for what happens in there.

    Args:
        function: importable; ``args`` and what it returns and says must pickle. ``say(record)`` sends word while it
            runs, for the case that the process ends without a word.
        timeout: seconds until the process is killed.
        threads: that torch computes with there.
        preload: the module that the server imports before it forks; the first call of a process decides.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([preload])
    ours, theirs = context.Pipe(duplex=False)
    start = time.monotonic()
    process = context.Process(target=_main, args=(theirs, threads, function, args), daemon=True)
    process.start()
    theirs.close()
    said: Record = {}
    ended: tuple[str, Any, str] | None = None
    peak, deadline, over = 0, start + timeout, False
    try:
        while ended is None and time.monotonic() < deadline:
            peak = max(peak, resident_peak(process.pid))
            if not wait([ours], timeout=_POLL_SECONDS):
                continue
            try:
                word, value, details = pickle.loads(ours.recv_bytes())
            except EOFError:
                over = True
                break
            if word == "say":
                said.update(value)
            else:
                ended, over = (word, value, details), True
    finally:
        process.join(_GRACE_SECONDS if over else 0)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()
    seconds, peak = time.monotonic() - start, max(peak, said.pop("host_peak", 0))
    if ended is not None and ended[0] == "done":
        return Outcome(ended[1], said, None, "", peak, seconds)
    if ended is not None:
        return Outcome(None, said, ended[1], ended[2], peak, seconds)
    error = f"not done within {timeout:.0f} s" if not over else f"the process died (exit code {process.exitcode})"
    return Outcome(None, said, error, error, peak, seconds)


def resident_peak(process: int | None) -> int:
    """The most bytes that were resident in a process (Linux's ``VmHWM``), or 0."""
    with suppress(OSError):
        status = Path(f"/proc/{process or 'self'}/status").read_text()
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    return 0


def _main(out: Connection, threads: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _die_first()
    torch.set_num_threads(threads)

    def send(*message: Any) -> None:
        out.send_bytes(pickle.dumps(message))

    def say(record: Record) -> None:
        send("say", record, "")

    try:
        value = function(say, *args)
        say({"host_peak": resident_peak(None)})
        send("done", value, "")
    except BaseException as error:
        say({"host_peak": resident_peak(None)})
        text = " ".join(str(error).split())
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        send("failed", text if len(text) <= _SHORT else f"{text[:_SHORT]}...", traceback.format_exc())
    out.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what the contenders left behind needs no orderly end


def _die_first() -> None:
    """Where host memory runs out the system ends this process, not its parent; and it ends with its parent."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
