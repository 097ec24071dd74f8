"""How much memory chunks may use, from what is asked for and what the machine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_gemini.core import ConfigurationError
from lightning_gemini.core.machine import available_bytes, total_bytes
from lightning_gemini.core.memory import format_bytes, parse_bytes

#: The share of an accelerator's memory that plans leave free unless margin says otherwise: for batches that take more
#: than the recorded one, and for fragments. An emulated device, where every byte is counted, needs none.
_MARGIN = 0.1


@dataclass(frozen=True)
class Budgets:
    """The bounds that a user has set; see the arguments of ``GeminiStrategy``.

    Raises:
        ConfigurationError: one is no number of bytes, or ``margin`` no share.
    """

    device_memory: int | float | str = "auto"
    host_memory: int | float | str = "auto"
    margin: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("device_memory", "host_memory"):
            _parsed(getattr(self, name), name)
        number = isinstance(self.margin, (int, float)) and not isinstance(self.margin, bool)
        if self.margin != "auto" and not (number and 0 <= self.margin < 1):
            raise ConfigurationError(
                f"margin must be 'auto' or a share of the device's memory from 0 to below 1, got {self.margin!r}."
            )

    def device_bytes(self, device: torch.device) -> int | None:
        """Bytes on ``device``, without the margin; ``None`` for no bound.

        Raises:
            ConfigurationError: more is asked for than the machine has.
        """
        emulated, asked = device.type == "cpu", _parsed(self.device_memory, "device_memory")
        _require_no_more(asked, device, "device_memory")
        if asked is None and not emulated:
            asked = available_bytes(device)
        margin = (0.0 if emulated else _MARGIN) if self.margin == "auto" else self.margin
        return None if asked is None else int(asked * (1 - margin))

    def host_bytes(self, processes: int) -> int | None:
        """Bytes of host memory for each of ``processes`` on this machine; ``None`` for no bound.

        Raises:
            ConfigurationError: more is asked for than the machine has.
        """
        cpu, asked = torch.device("cpu"), _parsed(self.host_memory, "host_memory")
        _require_no_more(asked, cpu, "host_memory")
        free = available_bytes(cpu) if asked is None else None
        return free // max(processes, 1) if free is not None else asked


def _parsed(value: int | float | str, name: str) -> int | None:
    return None if value == "auto" else parse_bytes(value, name)


def _require_no_more(asked: int | None, device: torch.device, name: str) -> None:
    total = total_bytes(device)
    if asked is not None and total is not None and asked > total:
        raise ConfigurationError(
            f"{name} is {format_bytes(asked)}, but this machine has {format_bytes(total)} there. Give less, or 'auto'."
        )
