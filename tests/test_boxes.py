"""Runs of elements as blocks: every element once, in order, and few blocks."""

from __future__ import annotations

import io
from collections import OrderedDict

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.checkpoint.boxes import boxes
from lightning_gemini.checkpoint.contents import MARK, put_together, take_apart
from lightning_gemini.checkpoint.flat import FlatTensor, Run, Source


@st.composite
def runs(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """A dense tensor that numbers its memory, in any order of dimensions, and a run of elements."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    numel = torch.Size(shape).numel()
    memory = torch.arange(numel).view([shape[dim] for dim in order])
    tensor = memory.permute(sorted(range(len(order)), key=order.__getitem__)) if shape else memory
    start = draw(st.integers(0, numel))
    return tensor, start, draw(st.integers(start, numel))


@given(runs())
def test_blocks_hold_the_run(run: tuple[torch.Tensor, int, int]) -> None:
    tensor, start, stop = run
    seen: list[int] = []
    found = boxes(tensor.shape, tensor.stride(), start, stop)
    assert len(found) <= max(1, 2 * tensor.dim() - 1)
    for box in found:
        block = tensor[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))]
        elements = sorted(block.flatten().tolist())
        assert elements == list(range(box.first, box.first + len(elements)))
        seen += elements
    assert seen == list(range(start, stop))


@given(runs())
def test_a_flat_tensor_shows_its_blocks(run: tuple[torch.Tensor, int, int]) -> None:
    tensor, start, stop = run
    source = Source(torch.arange(-3, stop + 2))  # the run lies somewhere in it
    flat = FlatTensor(tensor.shape, tensor.stride(), torch.int64, [Run(start, stop - start, source, start + 3)])
    for item in flat.__create_write_items__("name", flat):
        chunk = item.tensor_data.chunk
        block = tensor[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))]
        assert torch.equal(flat.__get_tensor_shard__(item.index), block)
    assert sum(chunk.sizes.numel() for chunk in flat.__create_chunk_list__()) == stop - start


def test_a_source_in_halves_is_joined() -> None:
    values = torch.randn(10)
    bits = values.view(torch.int32)
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    low = (bits & 0xFFFF).to(torch.int16)
    assert torch.equal(Source(high, low).values(2, 7), values[2:7])


def test_a_checkpoint_is_taken_apart_and_put_together() -> None:
    flat = FlatTensor([2], [1], torch.float32, [])
    plain, kept = torch.ones(2), torch.zeros(1)
    state: dict[str, object] = OrderedDict({"a": flat, "tied": flat, "buffer": plain, "extra": [1]})
    state.__dict__["_metadata"] = {"": {"version": 2}}
    checkpoint = {
        "epoch": 3,
        "state_dict": state,
        "callbacks": {"average": {"weights": {"a": flat}, "updates": (1, kept)}},
    }
    rest, tensors = take_apart(checkpoint)
    assert tensors == {"state_dict.a": flat, "state_dict.buffer": plain}
    assert rest["state_dict"]["tied"] == rest["state_dict"]["a"] == {MARK: "state_dict.a"}
    assert rest["callbacks"]["average"]["weights"] == {"a": {MARK: "state_dict.a"}}
    assert rest["callbacks"]["average"]["updates"][1] is kept
    assert checkpoint["state_dict"]["a"] is flat, "the checkpoint itself stays as it is"
    file = io.BytesIO()
    torch.save(rest, file)
    file.seek(0)
    again = put_together(torch.load(file, weights_only=True), tensors.__getitem__)
    assert again["state_dict"]._metadata == {"": {"version": 2}}
    assert again["state_dict"]["buffer"] is plain
    assert again["callbacks"]["average"]["weights"]["a"] is flat
