"""How the processes of a run are started, find each other and talk: Lightning's contract for parallel strategies."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from subprocess import Popen, TimeoutExpired
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    ReduceOp,
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_gemini.core import ConfigurationError
from lightning_gemini.core.errors import CheckpointError

StartMethod = Literal["auto", "popen", "spawn", "fork", "forkserver"]

_LONGEST_SECONDS = 10 * 365 * 86400  # what a timedelta and the process groups can hold


class RankStrategy(ParallelStrategy):
    """One process per device, on one or several machines; popen, multiprocessing, torchrun or SLURM."""

    def __init__(
        self,
        process_group_backend: str | None,
        timeout_seconds: float,
        start_method: StartMethod,
        accelerator: Accelerator | None,
        parallel_devices: list[torch.device] | None,
        cluster_environment: ClusterEnvironment | None,
        checkpoint_io: CheckpointIO | None,
        precision_plugin: Precision | None,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        if start_method not in get_args(StartMethod):
            raise ConfigurationError(
                f"start_method must be one of {', '.join(get_args(StartMethod))}, got {start_method!r}."
            )
        number = isinstance(timeout_seconds, (int, float)) and not isinstance(timeout_seconds, bool)
        if not number or not 0 < timeout_seconds < _LONGEST_SECONDS:
            raise ConfigurationError(f"timeout_seconds must be a positive number of seconds, got {timeout_seconds!r}.")
        self.num_nodes = 1
        self._backend = process_group_backend
        self._timeout = timedelta(seconds=timeout_seconds)
        self._abandoned: list[Popen[bytes]] = []  # processes that may never end by themselves
        self._start_method = start_method if start_method != "auto" else "fork" if _IS_INTERACTIVE else "popen"

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def is_distributed(self) -> bool:
        # without it Lightning would inject no DistributedSampler and ignore sync_dist
        return True

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    @override
    def _configure_launcher(self) -> None:
        # also where processes are created externally: SLURM's settings are validated by the launcher
        assert self.cluster_environment is not None
        if self._start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = _MultiProcessingLauncher(self, start_method=self._start_method)  # type: ignore[arg-type]

    def set_world_ranks(self) -> None:
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        # the setters above are no-ops in some environments, the getter is right in all
        rank_zero_only.rank = utils_rank_zero_only.rank = self.global_rank

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.abandon_processes(failed=False)  # of an earlier run
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        self._backend = self._backend or _get_default_process_group_backend_for_device(self.root_device)
        device_id = self.root_device if self.root_device.type != "cpu" else None
        _init_dist_connection(self.cluster_environment, self._backend, timeout=self._timeout, device_id=device_id)

    @property
    def parted(self) -> bool:
        """Whether a rank has failed and the others with it, so that they do not wait for each other any more."""
        return False

    @override
    def barrier(self, name: str | None = None) -> None:
        if _distributed_is_initialized() and not self.parted:
            on_device = {"device_ids": [self.root_device.index]} if dist.get_backend() == "nccl" else {}
            with self.explains(f"a barrier{f' ({name})' if name else ''}"):
                dist.barrier(**on_device)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        if not _distributed_is_initialized() or self.parted:
            return obj
        box = [obj]
        with self.explains("a broadcast"):
            dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        if not isinstance(tensor, Tensor) or self.parted:
            return tensor
        with self.explains("a reduction of values, as of a log or of whether every rank has a batch"):
            return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        with self.explains("an all-gather of values"):
            return super().all_gather(tensor, group, sync_grads)

    @contextmanager
    def on_all_ranks(self) -> Iterator[None]:
        """Around what each rank does alone: if it fails on one of them, all raise. All ranks have to call."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        texts = self.exchange(None if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None:
            raise failed
        for rank, text in enumerate(texts):
            if text is not None:
                raise CheckpointError(f"rank {rank} failed: {text}")

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank; all of them have to call."""
        if not _distributed_is_initialized() or self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.explains("an exchange of objects"):
            dist.all_gather_object(values, value)
        return values

    def abandon_processes(self, failed: bool) -> None:
        """Notes whether the ranks that this process started have to be ended with it, because the run has failed.

        Lightning ends the first rank if another one fails, but not the others if the first one does; one that is stuck
        in its own code would stay for ever. Launchers of other kinds end all.
        """
        if not self._abandoned and failed and isinstance(self._launcher, _SubprocessScriptLauncher):
            atexit.register(end_processes, self._abandoned)
        self._abandoned[:] = getattr(self._launcher, "procs", []) if failed else []

    def explains(self, what: str) -> AbstractContextManager[None]:
        """Around a wait for other ranks, for ``what``: what it raises says which of them failed, and why."""
        return nullcontext()

    def make_groups(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """Groups of all ranks, for gathers and for reductions; ``None`` for a process alone. All ranks have to call."""
        if self.world_size == 1:
            return None, None
        # gloo's connections are closed by a rank that fails, so they must not be those of everybody
        own = dist.get_backend() == "gloo"
        gathers = dist.new_group(timeout=self._timeout) if own else dist.group.WORLD
        return gathers, dist.new_group(timeout=self._timeout)

    def make_host_group(self) -> dist.ProcessGroup | None:
        """A group of all ranks for what is in host memory; ``None`` for a process alone. All ranks have to call."""
        return dist.new_group(timeout=self._timeout, backend="gloo") if self.world_size > 1 else None


def end_processes(processes: Sequence[Popen[bytes]], patience: float = 10.0) -> None:
    """Waits for processes to end by themselves, then asks them to, then kills them.

    Args:
        processes: those that this one started.
        patience: seconds, for each of the two waits.
    """
    for end in (Popen.terminate, Popen.kill):
        deadline = time.monotonic() + patience
        for process in processes:
            with suppress(TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in processes:
            if process.poll() is None:
                end(process)
