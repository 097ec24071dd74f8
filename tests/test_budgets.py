"""How much memory chunks may use, from what is asked for and what the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_gemini import GeminiStrategy
from lightning_gemini.budgets import Budgets
from lightning_gemini.core import ConfigurationError, machine

CPU = torch.device("cpu")
MIB = 2**20


def test_a_margin_is_left_free() -> None:
    assert Budgets(device_memory="1MiB", margin=0.25).device_bytes(CPU) == 0.75 * MIB
    assert Budgets(device_memory="1MiB", margin=0).device_bytes(CPU) == MIB
    assert Budgets(device_memory="1MiB").device_bytes(CPU) == MIB, "every byte of an emulated device is counted"
    assert Budgets(margin=0.25).device_bytes(CPU) is None


@pytest.mark.parametrize("margin", [-0.01, 1.0, 1.5, float("nan"), True, "0.25"])
def test_a_margin_that_is_no_share_is_refused(margin: float) -> None:
    with pytest.raises(ConfigurationError, match=r"margin must be 'auto' or a share .* from 0 to below 1, got"):
        Budgets(margin=margin)
    with pytest.raises(ConfigurationError, match="margin must be"):
        GeminiStrategy(margin=margin)


def test_a_control_group_bounds_host_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = machine.ControlGroup(limit=64 * MIB, free=40 * MIB)
    monkeypatch.setattr(machine, "control_group", lambda: group)
    assert machine.total_bytes(CPU) == 64 * MIB
    assert Budgets().host_bytes(processes=2) == 20 * MIB
    with pytest.raises(ConfigurationError, match=r"host_memory is 65.00 MiB, but this machine has 64.00 MiB"):
        Budgets(host_memory="65MiB").host_bytes(processes=1)
    monkeypatch.setattr(machine, "control_group", lambda: None)
    assert machine.total_bytes(CPU) > 64 * MIB
