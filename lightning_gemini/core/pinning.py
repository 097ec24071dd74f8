"""Page-locked (pinned) memory: ranges of host memory that the device copies from and to by itself."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol, SupportsInt

import torch
from torch import Tensor

from lightning_gemini.core.machine import control_group
from lightning_gemini.core.memory import format_bytes

#: cudaHostRegisterPortable: pinned for every CUDA context of the process. It is implied where host and device share
#: one address space (CUDA's "unified virtual addressing", any 64-bit Linux), and said for the sake of the others.
_PORTABLE = 1


class CudaRuntime(Protocol):
    """What of ``torch.cuda.cudart()`` is needed here. Calls return an error code, 0 for none."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int, /) -> SupportsInt: ...  # noqa: N802
    def cudaHostUnregister(self, address: int, /) -> SupportsInt: ...  # noqa: N802
    def cudaGetErrorString(self, error: Any, /) -> str: ...  # noqa: N802


def pin(memory: Tensor, owner: object, what: str, runtime: CudaRuntime | None = None) -> Callable[[], object] | None:
    """Page-locks ``memory`` until the function it returns is called, ``owner`` is gone or the interpreter exits.

    ``memory`` is kept until then: memory that is freed while CUDA has it registered would stay locked, and the next
    allocation at that address could not be registered. Every page of it becomes resident.

    Args:
        memory: 1-d, of any dtype, contiguous on the CPU; no other registered range may touch its pages.
        owner: what the lock lives as long as; anything that takes weak references.
        what: what the memory is for, in the warning.
        runtime: ``torch.cuda.cudart()`` by default.

    Returns:
        What unlocks the memory; may be called more than once. No copy may be under way in the memory then. ``None``
        where the system refuses: the memory stays pageable, and the first time in a process this is a warning.
    """
    cuda: CudaRuntime = torch.cuda.cudart() if runtime is None else runtime
    error = cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)
    if int(error):
        _forget_error()
        _warn_once(memory.nbytes, what, f"{cuda.cudaGetErrorString(error)}, CUDA error {int(error)}")
        return None
    return weakref.finalize(owner, _unpin, cuda, memory, os.getpid())


def _unpin(cuda: CudaRuntime, memory: Tensor, process: int) -> None:
    if os.getpid() != process:
        return  # a forked child inherits the memory, not the lock, and must not call CUDA
    if int(cuda.cudaHostUnregister(memory.data_ptr())):
        _forget_error()  # the context is gone, at exit or after an error of the device, and the lock with it


def _forget_error() -> None:
    """Takes the last failure off this thread's CUDA state.

    It stays there for ``cudaGetLastError``, which torch asks after it launches a kernel, so the next kernel of the
    model would be blamed for it. torch does not offer that call; a kernel of our own takes the blame.
    """
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):
            torch.empty(1, device="cuda").fill_(0)


_warned = False


def _warn_once(nbytes: int, what: str, reason: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    limits = "; ".join(_limits()) or "neither the locked-memory limit nor a control group bounds this process"
    warnings.warn(
        f"{what}: {format_bytes(nbytes)} of host memory cannot be pinned ({reason}) and stay pageable, so copies to "
        f"and from the device are slower and the host waits for them. {limits}. Raise the limits (`ulimit -l "
        "unlimited`; for a container, `--ulimit memlock=-1` and more memory) or use less host memory (host_memory=..., "
        "more ranks). Said once; other memory may be pageable too.",
        stacklevel=2,
    )


def _limits() -> Iterator[str]:
    """What bounds the memory that this process may lock or use, in words."""
    with suppress(ImportError):  # not on Windows
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft != resource.RLIM_INFINITY:
            yield f"the locked-memory limit (`ulimit -l`) is {format_bytes(soft)}"
    if (group := control_group()) is not None:
        yield f"the control group's memory limit (memory.max) is {format_bytes(group.limit)}"
