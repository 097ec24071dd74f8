"""The processor cores that one process may use for the work of the host, beside its peers on the same machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_gemini.core.worker import Worker

_SYSTEM = Path("/sys")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Claim:
    """What one process says of itself, so that those of one machine can share it.

    Attributes:
        machine: equal for processes on one machine.
        cpus: the logical CPUs that the process may run on, ascending.
        node: the NUMA node that its device is attached to, ``None`` if that is not known.
    """

    machine: str
    cpus: tuple[int, ...]
    node: int | None


@dataclass(frozen=True)
class HostThreads:
    """How one process runs the work of the host.

    Attributes:
        count: threads, at least one.
        processes: how many share the same CPUs, this one among them.
        cpus: the logical CPUs that these threads are bound to; ``None`` for all that the process may run on.
    """

    count: int
    processes: int = 1
    cpus: tuple[int, ...] | None = None

    def __str__(self) -> str:
        text = f"{self.count} {'thread' if self.count == 1 else 'threads'}"
        return text if self.cpus is None else f"{text} on CPUs {_ranges(self.cpus)}"

    def worker(self, name: str) -> Worker:
        """A thread that works like this, and has begun."""
        worker, default = Worker(name, self._apply), torch.get_num_threads()
        try:
            worker.submit(lambda: None).result()
        except BaseException:
            worker.close(wait=True)
            raise
        finally:
            torch.set_num_threads(default)  # the worker's own number is not for threads that others start later
        return worker

    def _apply(self) -> None:
        """Has the calling thread, and those that it starts, work like this.

        OpenMP keeps the number of threads for each thread that starts work, so a launcher's OMP_NUM_THREADS=1 goes on
        to bind the others.
        """
        if self.cpus is not None:
            os.sched_setaffinity(0, self.cpus)
        torch.get_num_threads()  # torch gives a thread the number of the process when it first asks: now, not later
        torch.set_num_threads(self.count)


def claim(device: torch.device) -> Claim:
    """The claim of this process, which computes on ``device``."""
    machine = _BOOT.read_text().strip() if _BOOT.exists() else platform.node()
    # only some systems bind processes to CPUs
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Claim(machine, tuple(sorted(cpus)), _node_of(device))


def share(mine: int, claims: Sequence[Claim], root: Path = _SYSTEM) -> HostThreads:
    """Which threads the process with claim number ``mine`` takes: its part of the cores of the machine.

    Processes with the same CPUs share the physical cores evenly. Where there are at least as many of them as NUMA
    nodes, each stays on one node: that of its device if it is known, so that no memory is read across nodes.

    Args:
        claims: of all processes of the run, by rank.
        root: of the system's description of its processors.
    """
    own = claims[mine]
    peers = [rank for rank, other in enumerate(claims) if (other.machine, other.cpus) == (own.machine, own.cpus)]
    nodes = _nodes(own.cpus, root)
    granted = _quota(root) // sum(other.machine == own.machine for other in claims)  # whoever is bound to which CPUs
    if len(nodes) == 1 or len(peers) < len(nodes):
        count = max(1, min(_cores(own.cpus, root) // len(peers), granted))
        return HostThreads(count, len(peers))

    def node_of(rank: int) -> int:
        wanted = claims[rank].node
        return wanted if wanted in nodes else sorted(nodes)[peers.index(rank) * len(nodes) // len(peers)]

    node = node_of(mine)
    beside = sum(node_of(rank) == node for rank in peers)
    count = max(1, min(_cores(nodes[node], root) // beside, granted))
    return HostThreads(count, len(peers), tuple(sorted(nodes[node])))


def _nodes(cpus: Collection[int], root: Path) -> dict[int, set[int]]:
    """By NUMA node, those of ``cpus`` that belong to it; one node for all where the system does not tell."""
    found = {}
    for path in root.glob("devices/system/node/node[0-9]*/cpulist"):
        here = _parse(path.read_text()) & set(cpus)
        if here:
            found[int(path.parent.name.removeprefix("node"))] = here
    return found if set().union(*found.values()) == set(cpus) else {0: set(cpus)}


def _cores(cpus: Iterable[int], root: Path) -> int:
    """Physical cores of ``cpus``: hardware threads of one core share the units that an update keeps busy."""
    cores = set()
    for cpu in cpus:
        path = root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(min(_parse(path.read_text())) if path.exists() else cpu)
    return len(cores)


def _quota(root: Path) -> int:
    """How many CPUs the control group of a container grants; a large number without a bound."""
    path = root / "fs/cgroup/cpu.max"
    quota, _, period = path.read_text().partition(" ") if path.exists() else ("max", "", "")
    return 2**30 if quota == "max" else max(1, round(int(quota) / int(period)))


def _node_of(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    seen = torch.cuda.get_device_properties(device)
    place = [getattr(seen, f"pci_{name}_id", None) for name in ("domain", "bus", "device")]
    known = [number for number in place if number is not None]
    if len(known) < len(place):
        return None
    path = _SYSTEM / "bus/pci/devices/{:04x}:{:02x}:{:02x}.0/numa_node".format(*known)
    node = int(path.read_text()) if path.exists() else -1
    return None if node < 0 else node


def _parse(text: str) -> set[int]:
    """``"0-3,8"`` as a set."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _ranges(cpus: Sequence[int]) -> str:
    """The reverse of :func:`_parse`."""
    parts: list[list[int]] = []
    for cpu in cpus:
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)
