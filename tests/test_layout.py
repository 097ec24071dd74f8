"""The layout is a pure value: complete, aligned, the same every time; and the size search does not waste."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.core import ConfigurationError, Layout, ParamSpec, plan_layout
from lightning_gemini.core.layout import search_chunk_numel, tag_numel

_DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.complex64]


@st.composite
def specs(draw: st.DrawFn) -> list[ParamSpec]:
    result = []
    for index in range(draw(st.integers(1, 25))):
        shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
        trainable = draw(st.booleans())
        optimizer = draw(st.sampled_from([None, 0, 1])) if trainable else None
        group = draw(st.integers(0, 1)) if optimizer is not None else None
        stride = tuple(torch.empty(shape, device="meta").stride())
        result.append(
            ParamSpec(f"p{index}", shape, stride, draw(st.sampled_from(_DTYPES)), trainable, optimizer, group)
        )
    return result


@settings(max_examples=200, deadline=None)
@given(specs(), st.integers(1, 5), st.integers(1, 5000), st.sampled_from([1, 8, 64, 256]))
def test_every_parameter_has_a_place_of_its_own(
    params: list[ParamSpec], world_size: int, extra: int, alignment: int
) -> None:
    layout = plan_layout(params, world_size, alignment * world_size + extra, alignment)
    seen = set()
    for chunk in layout.chunks:
        assert chunk.numel % (world_size * alignment) == 0
        assert layout.chunks[chunk.index] is chunk
        end = 0
        for slot in chunk.slots:
            spec = layout.params[slot.param]
            assert spec.kind == chunk.kind
            assert slot.numel == spec.numel
            assert slot.offset % alignment == 0
            assert slot.offset >= end, "parameters overlap"
            end = slot.end
            seen.add(slot.param)
            assert layout.place(slot.param) == (chunk.index, slot)
        assert end + tag_numel(chunk.kind.dtype) <= chunk.numel, "the tag lies in a parameter"
        assert chunk.numel <= layout.chunk_numel or len(chunk.slots) == 1, "only a large parameter makes a large chunk"
        assert [slot.param for slot in chunk.slots] == sorted(slot.param for slot in chunk.slots)
    assert seen == set(range(len(params)))
    assert 0 <= layout.waste <= 1


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(1, 4))
def test_the_same_everywhere(params: list[ParamSpec], world_size: int) -> None:
    first, second = plan_layout(params, world_size), plan_layout(list(params), world_size)
    assert first == second
    assert first.fingerprint == second.fingerprint
    assert pickle.loads(pickle.dumps(first)) == first
    assert "parameters in" in str(first)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 150_000), min_size=1, max_size=25), st.sampled_from([1, 2, 4]))
def test_the_search_beats_the_sizes_one_would_guess(numels: list[int], world_size: int) -> None:
    params = [_linear(numel) for numel in numels]
    layout = plan_layout(params, world_size)
    assert layout.chunk_numel == search_chunk_numel(params, world_size)
    for size in (2**17, 2**17 + 2**16, 2**18):
        assert layout.nbytes <= plan_layout(params, world_size, size).nbytes


def _linear(numel: int, name: str = "p", dtype: torch.dtype = torch.float32) -> ParamSpec:
    return ParamSpec(name, (numel,), (1,), dtype, True, 0, 0)


def test_kinds_do_not_mix_and_keep_their_order() -> None:
    groups = [0, 1, 0, 1, 0]
    params = [ParamSpec(f"p{i}", (64,), (1,), torch.float32, True, 0, group) for i, group in enumerate(groups)]
    layout = plan_layout(params, 1, 1024)
    assert [[slot.param for slot in chunk.slots] for chunk in layout.chunks] == [[0, 2, 4], [1, 3]]


def test_reductions_start_with_the_chunk_that_is_complete_first() -> None:
    # decay in 0 and 2, no decay in 1: the chunk of group 1 reaches back to the first layer
    params = [ParamSpec(f"p{i}", (600,), (1,), torch.float32, True, 0, i % 2) for i in range(4)]
    layout = plan_layout(params, 1, 1024)
    assert [chunk.slots[0].param for chunk in layout.chunks] == [0, 2, 1, 3]
    assert [layout.chunks[index].slots[0].param for index in layout.reduce_order] == [3, 2, 1, 0]


def test_a_large_parameter_gets_a_chunk_of_its_own() -> None:
    layout = plan_layout([_linear(100), _linear(5000), _linear(100)], 2, 1024)
    assert [[slot.param for slot in chunk.slots] for chunk in layout.chunks] == [[0], [1], [2]]
    assert layout.chunks[1].numel >= 5001


def test_the_last_chunk_of_a_kind_ends_with_its_parameters() -> None:
    layout = plan_layout([_linear(100)], 1, 2**20)
    assert layout.chunks[0].numel == 128


def test_waste_is_reported() -> None:
    layout = plan_layout([_linear(65)], 1, 128)
    assert layout.waste == pytest.approx(1 - 65 / 128)
    assert "49.2% of it unused" in str(layout)


@pytest.mark.parametrize(("world_size", "size"), [(1, 63), (2, 127), (1, 1)])
def test_a_chunk_that_cannot_be_aligned_is_refused(world_size: int, size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"at least {64 * world_size} elements.*got {size}"):
        plan_layout([_linear(10)], world_size, size)


def test_like_chunks_share_a_line_of_the_table() -> None:
    layout = plan_layout([_linear(1000) for _ in range(10)], 1, 1024)
    assert isinstance(layout, Layout)
    assert "0-9" in str(layout)
    assert len(str(layout).splitlines()) == 3
