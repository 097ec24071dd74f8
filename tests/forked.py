"""Work in a forked process, which may be killed in the middle of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist


def in_child(work: Callable[[], object]) -> int:
    """Starts ``work`` in a copy of this process, and returns its id; its exit code is 0 if ``work`` returns, else 3."""
    if dist.is_initialized():  # by a test before; the copy would have its groups, but not their threads
        dist.destroy_process_group()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            # OpenMP's threads are not copied, and a parallel loop would wait for them for ever
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def was_killed(pid: int) -> bool:
    """Waits for a process; whether it was killed (SIGKILL)."""
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
