"""Budgets and buffers."""

from __future__ import annotations

import pytest
import torch

from lightning_gemini.core.errors import OutOfBudgetError
from lightning_gemini.core.memory import BufferPool, Tier


def test_a_tier_asks_for_room_before_it_refuses() -> None:
    asked = []
    tier = Tier("device", torch.device("cpu"), capacity=100, spare=asked.append)
    tier.take(80, "one thing")
    with pytest.raises(OutOfBudgetError, match=r"another thing needs 30 B of device memory, but 80 B of 100 B are"):
        tier.take(30, "another thing")
    assert asked == [30]
    assert (tier.used, tier.peak) == (80, 80)


def test_a_pool_keeps_the_smaller_buffers_up_to_a_bound() -> None:
    tier = Tier("device", torch.device("cpu"))
    pool = BufferPool(tier)
    taken = [pool.get(numel, torch.float32, "a test") for numel in (100, 10, 10, 10, 1000)]
    for buffer in taken:
        pool.put(buffer)
    pool.clear(keep=100)  # bytes: two of the buffers of 40
    assert tier.used == 80
    again = [pool.get(10, torch.float32, "a test") for _ in range(2)]
    assert {b.data_ptr() for b in again} < {b.data_ptr() for b in taken}
    pool.clear()
    assert tier.used == 80  # in use, not in the pool
    for buffer in again:
        pool.put(buffer)
    pool.clear()
    assert tier.used == 0


def test_a_pool_gives_up_what_waits_before_it_asks_for_more() -> None:
    tier = Tier("device", torch.device("cpu"), capacity=100)
    pool = BufferPool(tier)
    pool.put(pool.get(20, torch.float32, "a test"))
    assert pool.get(25, torch.float32, "a test").nbytes == tier.used == 100
