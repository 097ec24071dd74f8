"""Slabs: no two tensors overlap, what is counted is what there is, slots are used again, pins come off."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_gemini.core import machine, pinning
from lightning_gemini.core.errors import ConfigurationError, OutOfBudgetError, StateError
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.slabs import SLOT_ALIGNMENT, Slabs
from tests.test_launchers import run

PAGE = os.sysconf("SC_PAGE_SIZE")
DTYPES = [torch.uint8, torch.bfloat16, torch.int16, torch.float32, torch.float64]


class FakeRuntime:
    """Registers ranges as CUDA does: none twice, none that touches another's pages. Refuses more than ``limit``."""

    def __init__(self, limit: int = 2**40) -> None:
        self.limit = limit
        self.ranges: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int, /) -> int:  # noqa: N802
        assert flags == 1
        if nbytes > self.limit:
            return 2
        for other, length in self.ranges.items():
            if address // PAGE <= (other + length - 1) // PAGE and other // PAGE <= (address + nbytes - 1) // PAGE:
                return 712
        self.ranges[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int, /) -> int:  # noqa: N802
        return 0 if self.ranges.pop(address, None) else 713

    def cudaGetErrorString(self, error: int, /) -> str:  # noqa: N802
        return {2: "out of memory"}.get(error, "unknown error")


def host(capacity: int | None = None) -> Tier:
    return Tier("host", torch.device("cpu"), capacity)


@pytest.fixture(autouse=True)
def not_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_warned", False)


def rounded(nbytes: int) -> int:
    return max(-(-nbytes // SLOT_ALIGNMENT), 1) * SLOT_ALIGNMENT


# Slots

CAPACITY = 30_000
SIZES = st.sampled_from([0, 100, 256, 500, 1024, 4096])  # bytes
NUMELS = st.sampled_from([0, 1, 100, 128, 129, 256, 1000])  # few sizes of slots, so that they are used again


class SlabsMachine(RuleBasedStateMachine):
    """Any order of calls, against a list of what is out and of how each slab was cut."""

    def __init__(self) -> None:
        super().__init__()
        self.tier, self.runtime = host(CAPACITY), FakeRuntime()
        self.slabs = Slabs(self.tier, pin=True, runtime=self.runtime)
        self.out: list[tuple[torch.Tensor, int]] = []  # with the number each is filled with
        self.cuts: dict[int, list[int]] = {}  # slot sizes by the slab's address
        self.number = 0

    def free(self) -> Counter[int]:
        """How many slots of each size are free."""
        slots = Counter(size for sizes in self.cuts.values() for size in sizes)
        slots.subtract(rounded(tensor.nbytes) for tensor, _ in self.out)
        return slots

    def cut(self, sizes: list[int]) -> None:
        """Notes the slab that is new."""
        new = self.runtime.ranges.keys() - self.cuts.keys()
        assert len(new) == bool(sizes)
        self.cuts |= dict.fromkeys(new, sizes)

    @initialize(sizes=st.lists(SIZES, min_size=2, max_size=6))
    def begin(self, sizes: list[int]) -> None:
        self.reserve(sizes)

    @rule(sizes=st.lists(SIZES, max_size=6))
    def reserve(self, sizes: list[int]) -> None:
        before, total = self.tier.used, sum(map(rounded, sizes))
        if before + total > CAPACITY:
            with pytest.raises(OutOfBudgetError):
                self.slabs.reserve(iter(sizes), "a test")
            assert self.tier.used == before
            return
        self.slabs.reserve(iter(sizes), "a test")
        assert self.tier.used == before + total
        self.cut([rounded(size) for size in sizes])

    @rule(numel=NUMELS, dtype=st.sampled_from(DTYPES), inference=st.booleans())
    def get(self, numel: int, dtype: torch.dtype, inference: bool) -> None:
        before, size = self.tier.used, rounded(numel * dtype.itemsize)
        reused = self.free()[size] > 0
        if not reused and before + size > CAPACITY:
            with pytest.raises(OutOfBudgetError):
                self.slabs.get(numel, dtype, "a test")
            return
        with torch.inference_mode(inference):
            tensor = self.slabs.get(numel, dtype, "a test")
        assert self.tier.used == before + (0 if reused else size), "a free slot was there, or one was made of that size"
        self.cut([] if reused else [size])
        assert (tensor.shape, tensor.dtype, tensor.is_inference()) == ((numel,), dtype, False)
        assert tensor.is_contiguous()
        self.number = (self.number + 1) % 128
        self.out.append((tensor.fill_(self.number), self.number))

    @rule(index=st.integers(0, 10))
    def put(self, index: int) -> None:
        if not self.out:
            return
        tensor, _ = self.out.pop(index % len(self.out))
        before = self.tier.used
        self.slabs.put(tensor)
        assert self.tier.used == before
        with pytest.raises(StateError, match="given back before"):
            self.slabs.put(tensor)

    @rule()
    def trim(self) -> None:
        self.slabs.trim()
        in_use = {tensor.untyped_storage().data_ptr() for tensor, _ in self.out}
        assert self.runtime.ranges.keys() == in_use
        self.cuts = {address: sizes for address, sizes in self.cuts.items() if address in in_use}

    @invariant()
    def nothing_overlaps_and_bytes_add_up(self) -> None:
        assert all((tensor == number).all() for tensor, number in self.out)
        places = sorted((start(tensor), rounded(tensor.nbytes)) for tensor, _ in self.out)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(places))
        assert all(address % SLOT_ALIGNMENT == 0 for address, _ in places)
        assert self.tier.used == self.slabs.reserved_bytes == self.slabs.pinned_bytes
        assert self.tier.used == sum(self.runtime.ranges.values()), "exactly what is counted is pinned"
        assert self.runtime.ranges == {address: sum(sizes) for address, sizes in self.cuts.items()}
        for address, size in places:
            assert any(a <= address and address + size <= a + length for a, length in self.runtime.ranges.items())

    def teardown(self) -> None:
        self.slabs.close()
        assert (self.tier.used, self.runtime.ranges) == (0, {})
        assert all((tensor == number).all() for tensor, number in self.out), "still readable"


def start(tensor: torch.Tensor) -> int:
    """Also of a tensor without elements, whose data_ptr is 0."""
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()


TestSlabsMachine = SlabsMachine.TestCase
TestSlabsMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_the_slots_of_a_slab_fill_it_without_a_gap() -> None:
    runtime, sizes = FakeRuntime(), [100, 5000, 256, 0, 1024, 5000]
    slabs = Slabs(host(), pin=True, runtime=runtime)
    slabs.reserve(sizes, "a test")
    places = sorted(
        (start(tensor), rounded(tensor.nbytes)) for tensor in (slabs.get(n, torch.uint8, "") for n in sizes)
    )
    ((address, nbytes),) = runtime.ranges.items()
    assert [place for place, _ in places] + [address + nbytes] == [address] + [place + size for place, size in places]


def test_a_gradient_takes_the_slot_of_a_shard_as_wide() -> None:
    tier = host()
    slabs = Slabs(tier, pin=False)
    slabs.reserve([2 * 1000, 4 * 1000], "chunks")
    shard = slabs.get(1000, torch.bfloat16, "a shard")
    place = shard.data_ptr()
    slabs.put(shard)
    gradient = slabs.get(1000, torch.float16, "a gradient")
    assert gradient.data_ptr() == place
    assert slabs.get(1000, torch.float32, "a master").data_ptr() != place
    assert tier.used == slabs.reserved_bytes == 2048 + 4096
    assert slabs.pinned_bytes == 0


def test_a_change_of_one_tensor_is_no_change_of_its_neighbours_for_autograd() -> None:
    slabs = Slabs(host(), pin=False)
    slabs.reserve([1024, 1024], "a test")
    saved, other = (slabs.get(256, torch.float32, "a test").fill_(2) for _ in range(2))
    leaf = torch.ones(256, requires_grad=True)
    product = (leaf * saved).sum()
    other.fill_(3)
    product.backward()
    assert torch.equal(leaf.grad, saved)


def test_what_does_not_come_from_get_is_refused() -> None:
    slabs, others = Slabs(host(), pin=False), Slabs(host(), pin=False)
    tensor = slabs.get(100, torch.float32, "a test")
    for foreign in (torch.empty(100), others.get(100, torch.float32, "a test")):
        with pytest.raises(StateError, match=r"100 elements of torch\.float32 that does not come from these slabs"):
            slabs.put(foreign)
    for view in (tensor[:50], tensor.view(torch.int32), tensor.detach()):
        with pytest.raises(StateError, match="is a view of one"):
            slabs.put(view)
    slabs.put(tensor)
    successor = slabs.get(100, torch.float32, "a test")
    with pytest.raises(StateError, match="was given back before"):
        slabs.put(tensor)  # although its slot is in use again
    slabs.put(successor)


def test_trim_frees_a_slab_only_when_all_its_slots_are_free() -> None:
    tier = host()
    slabs = Slabs(tier, pin=False)
    slabs.reserve([256, 512], "a pair")
    first, second = slabs.get(64, torch.float32, "a test"), slabs.get(128, torch.float32, "a test")
    slabs.put(first)
    slabs.trim()
    assert tier.used == 768
    assert slabs.get(64, torch.float32, "a test").data_ptr() == first.data_ptr(), "its slot was not lost"
    slabs.put(second)
    slabs.trim()
    assert tier.used == 768


def test_errors_leave_nothing_counted() -> None:
    tier = host()
    slabs = Slabs(tier, pin=False)
    with pytest.raises(OutOfBudgetError, match=r"a test needs 4294967296.00 GiB of host memory.*does not give"):
        slabs.get(2**62, torch.uint8, "a test")
    for call in (lambda: slabs.get(-1, torch.float32, "a test"), lambda: slabs.reserve([1, -1], "a test")):
        with pytest.raises(ValueError, match="negative"):
            call()
    assert tier.used == slabs.reserved_bytes == 0


def test_a_runtime_that_fails_leaves_nothing_counted() -> None:
    class Broken(FakeRuntime):
        def cudaHostRegister(self, address: int, nbytes: int, flags: int, /) -> int:  # noqa: N802
            raise KeyError

    tier = host()
    with pytest.raises(KeyError):
        Slabs(tier, pin=True, runtime=Broken()).get(1, torch.float32, "a test")
    assert tier.used == 0


def test_closed_slabs_say_so() -> None:
    slabs = Slabs(host(), pin=False)
    tensor = slabs.get(1, torch.float32, "a test")
    slabs.close()
    slabs.close()
    for call in (lambda: slabs.get(1, torch.float32, "a test"), lambda: slabs.reserve([1], "a test")):
        with pytest.raises(StateError, match="a test asks for memory of slabs that are closed"):
            call()
    with pytest.raises(StateError, match="comes too late"):
        slabs.put(tensor)


@pytest.mark.parametrize("pin", [False, True])
def test_slabs_are_host_memory(pin: bool) -> None:
    with pytest.raises(ConfigurationError, match="the tier is on meta: use the host tier"):
        Slabs(Tier("device", torch.device("meta")), pin=pin)


def test_memory_is_not_touched_before_it_is_used() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    slabs = Slabs(host(), pin=False)
    before = resident()
    slabs.reserve([2**25] * 4, "a test")
    tensor = slabs.get(2**25, torch.uint8, "a test")
    assert resident() - before < 2**24
    tensor.fill_(1)
    assert resident() - before > 2**24
    slabs.put(tensor)
    del tensor
    slabs.trim()
    assert resident() - before < 2**24


# Pinning


def test_a_slab_is_pinned_whole_at_a_page_and_until_it_is_freed() -> None:
    runtime = FakeRuntime()
    slabs = Slabs(host(), pin=True, runtime=runtime)
    slabs.reserve([100, 5000], "a test")
    ((address, nbytes),) = runtime.ranges.items()
    assert (address % PAGE, nbytes) == (0, 256 + 5120)
    tensor = slabs.get(25, torch.float32, "a test")
    slabs.trim()
    assert runtime.ranges
    slabs.put(tensor)
    slabs.trim()
    assert runtime.ranges == {}


def test_where_the_system_refuses_memory_is_pageable_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_limits", lambda: iter(["the locked-memory limit (`ulimit -l`) is 8.00 MiB"]))
    runtime = FakeRuntime(limit=10_000)
    slabs = Slabs(host(), pin=True, runtime=runtime)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        slabs.reserve([20_480], "the model's shards")
        slabs.reserve([20_480], "the optimizer's states")
        Slabs(host(), pin=True, runtime=runtime).get(20_480, torch.uint8, "another engine")
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(
        "the model's shards: 20.00 KiB of host memory cannot be pinned (out of memory, CUDA error 2)"
    )
    assert "the locked-memory limit (`ulimit -l`) is 8.00 MiB. Raise the limits (`ulimit -l unlimited`;" in text
    assert (slabs.reserved_bytes, slabs.pinned_bytes) == (40_960, 0)
    slabs.get(20_480, torch.uint8, "a test").fill_(1)
    slabs.get(1, torch.uint8, "a test")
    assert slabs.pinned_bytes == 256, "what is small enough is still pinned"
    slabs.close()
    assert runtime.ranges == {}


def test_slabs_that_are_dropped_are_unpinned() -> None:
    runtime = FakeRuntime()
    kept = []

    def fails() -> None:
        slabs = Slabs(host(), pin=True, runtime=runtime)
        kept.append(slabs.get(100, torch.float32, "a test"))
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    gc.collect()
    assert runtime.ranges == {}
    kept[0].fill_(1)  # as long as the tensor is there, so is its memory


def test_a_forked_child_leaves_the_pins_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    slabs = Slabs(host(), pin=True, runtime=runtime)
    slabs.reserve([1], "a test")
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        slabs.close()
    assert len(runtime.ranges) == 1


def test_pins_come_off_when_the_interpreter_exits() -> None:
    script = """
import torch
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.slabs import Slabs
class Runtime:
    def cudaHostRegister(self, address, nbytes, flags): return 0
    def cudaHostUnregister(self, address): print("unpinned", end=""); return 0
slabs = Slabs(Tier("host", torch.device("cpu")), True, Runtime())
tensor = slabs.get(8, torch.float32, "a test")
"""
    assert run(sys.executable, "-c", script) == "unpinned"


def test_limits_are_those_of_the_process_and_its_control_groups(tmp_path: Path) -> None:
    membership, mount = tmp_path / "cgroup", tmp_path / "mount"
    inner = mount / "outer" / "inner"
    inner.mkdir(parents=True)
    membership.write_text("4:memory:/old\n0::/outer/inner\n")
    assert machine.control_group(membership, mount) is None
    (inner / "memory.max").write_text("max\n")
    (mount / "outer" / "memory.max").write_text("4096\n")
    assert machine.control_group(membership, mount) == machine.ControlGroup(4096, 4096)
    (inner / "memory.max").write_text("512\n")
    assert machine.control_group(membership, mount) == machine.ControlGroup(512, 512)
    # what others in the outer group use leaves less than the inner one's limit; files that can be read again do not
    (mount / "outer" / "memory.current").write_text("4000\n")
    assert machine.control_group(membership, mount) == machine.ControlGroup(512, 96)
    (mount / "outer" / "memory.stat").write_text("anon 3900\ninactive_file 100\nactive_file 0\n")
    assert machine.control_group(membership, mount) == machine.ControlGroup(512, 196)
    assert machine.control_group(tmp_path / "none", mount) is None


def test_no_warning_where_nothing_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Slabs(host(), pin=True, runtime=FakeRuntime()).reserve([2**20], "a test")
