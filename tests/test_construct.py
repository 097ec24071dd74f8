"""Models on meta are initialised parameter by parameter; values are rank 0's; nobody holds the whole."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_gemini.core import ConfigurationError, Home, shard
from lightning_gemini.core.construct import leave_meta
from tests import cases
from tests.ranks import run_ranks

NAMES = ["Mlp", "ConvNet", "lstm", "attention", "torch_transformer", "opt", "llama", "bert", "t5", "TiedWeight"]


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return cases.CASES[name].build()


@pytest.mark.parametrize("home", [Home.FULL, Home.HOST])
@pytest.mark.parametrize("name", NAMES)
def test_meta_is_initialised_as_if_it_had_been_built(name: str, home: Home) -> None:
    torch.manual_seed(0)
    model, built = on_meta(name), cases.build(name)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = shard(model, [optimizer], home=home, chunk_size=4096)
    with torch.no_grad():
        assert cases.CASES[name].loss(model.eval(), cases.batches(name, 1, 1)[0][0]).isfinite()
    engine.release()
    for (key, value), expected in zip(model.named_parameters(), built.parameters(), strict=True):
        assert value.shape == expected.shape
        assert value.isfinite().all()
        if value.numel() > 500 and expected.std() > 0:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.15), key
        elif expected.std() == 0:
            assert torch.equal(value, expected), key
    for (key, value), expected in zip(model.named_buffers(), built.buffers(), strict=True):
        assert torch.equal(value, expected), key


def test_optimizers_accept_what_left_meta() -> None:
    model = on_meta("lstm")
    parameters = list(model.parameters())
    unbuilt = leave_meta(model, torch.device("cpu"))
    assert unbuilt == set(parameters) == set(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine = shard(model, [optimizer], unbuilt=unbuilt)
    engine.release()
    assert all(p.isfinite().all() for p in parameters)


class _Nobody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.ones(3))


class _Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight[:2])


@pytest.mark.parametrize(("make", "named"), [(_Nobody, "0.weight, 0.table"), (_Half, "0.weight")])
def test_what_nobody_initialises_is_refused_by_name(make: type, named: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(make(), nn.Linear(3, 3))
    with pytest.raises(ConfigurationError, match=f"initialised by nobody: {named}.*reset_parameters"):
        shard(model)


def test_a_model_that_was_left_in_pieces_is_refused() -> None:
    model = cases.build("Mlp")
    engine = shard(model, home=Home.DEVICE)
    for chunk in engine.store.chunks:
        chunk.let_go()
    with pytest.raises(ConfigurationError, match=r"layers.0.0.weight.*holds no values"):
        shard(model)


def _live_bytes() -> int:
    storages = {}
    with torch._C.DisableTorchFunction():  # looking is not touching
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _build_and_measure(empty: bool) -> tuple[int, int, list[torch.Tensor]]:
    torch.manual_seed(dist.get_rank())  # rank 0's values count
    torch.nn.init.normal_(torch.empty(3))
    gc.collect()
    before, peak = _live_bytes(), 0

    class Wide(nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            nonlocal peak
            peak = max(peak, _live_bytes() - before) if not self.weight.is_meta else peak

    with torch.device("meta" if empty else "cpu"):
        model = nn.Sequential(*(Wide(128, 128) for _ in range(16)))
    engine = shard(model, group=dist.group.WORLD, home=Home.DEVICE, chunk_size=128 * 130)
    engine.release()
    return peak, engine.layout.nbytes, [p.detach() for p in model.parameters()]


def test_no_rank_holds_the_whole_model() -> None:
    for empty in (True, False):
        (peak, whole, first), (_, _, second) = run_ranks(_build_and_measure, 2, empty)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "ranks differ"
        if empty:
            # its own half, and a few parameters on their way
            assert peak < whole / 2 + 8 * 128 * 129 * 4 / 2 + 128 * 129 * 4
