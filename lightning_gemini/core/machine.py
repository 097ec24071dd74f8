"""How much memory the machine has and could give, within the bounds of a container."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class ControlGroup:
    """The bounds that control groups (version 2) set to this process, in bytes.

    Attributes:
        limit: the lowest of what the processes of one group may use together.
        free: the least of what is not in use in one of them, or only by files that can be read again. That may be
            another group than the one with the lowest limit.
    """

    limit: int
    free: int


def total_bytes(device: torch.device) -> int | None:
    """Bytes of memory that there are on ``device`` for this process, in use or not; ``None`` if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    group = control_group()
    return _least(_pages("SC_PHYS_PAGES"), None if group is None else group.limit) if device.type == "cpu" else None


def available_bytes(device: torch.device) -> int | None:
    """Bytes that this process could use on ``device``; ``None`` if unknown.

    On CUDA with what torch holds there already; on the CPU only what it could have beside what it holds.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    group, linux = control_group(), _mem_available()
    return _least(_pages("SC_AVPHYS_PAGES") if linux is None else linux, None if group is None else group.free)


def control_group(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> ControlGroup | None:
    """The bounds of this process's control group and of those above it; ``None`` if nothing bounds it."""
    limits, free = [], []
    with suppress(OSError):
        group = next((line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")), "/")
        folder = mount / group.lstrip("/")
        for place in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # no such file at the root; "max" where nothing bounds it
                limit = int((place / "memory.max").read_text())
                limits.append(limit)
                free.append(max(limit - _in_use(place), 0))
            if place == mount:
                break
    return ControlGroup(min(limits), min(free)) if limits else None


def _in_use(group: Path) -> int:
    """What a control group uses, but for cached files that nobody has read lately."""
    used = 0
    with suppress(OSError, ValueError):
        used = int((group / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        used -= int(cached[1]) if cached is not None else 0
    return used


def _mem_available() -> int | None:
    """What Linux says it could give without swapping: free memory, and most of what files are cached in."""
    with suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return None if match is None else int(match[1]) * 1024
    return None


def _pages(name: str) -> int | None:
    if not hasattr(os, "sysconf") or name not in os.sysconf_names:
        return None
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")


def _least(*amounts: int | None) -> int | None:
    return min((amount for amount in amounts if amount is not None), default=None)
