"""The same engine on a GPU: equal to plain PyTorch there, and nothing left behind."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_gemini import GeminiPrecision, GeminiStrategy
from lightning_gemini.core import Home, pinning, shard
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.slabs import Slabs
from lightning_gemini.core.streams import Stopwatch, lanes
from lightning_gemini.optim.adam import Adam
from lightning_gemini.optim.kernel import Kernel, kernel_for
from lightning_gemini.optim.operands import Operands
from lightning_gemini.optim.tensor_kernel import TensorKernel
from tests import cases
from tests.lightning_cases import Module, loader, trainer

pytestmark = pytest.mark.gpu

STEPS = 3


def _train(name: str, home: Home | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = cases.build(name)
    if home is None:
        model.cuda()
    optimizer = cases.adamw(name, model)
    engine = None
    if home is not None:
        engine = shard(model, [optimizer], device="cuda", home=home, chunk_size=2048, **cases.CASES[name].options)
    losses = []
    for step in cases.batches(name, STEPS, 1):
        loss = cases.CASES[name].loss(model, tree_map_only(torch.Tensor, torch.Tensor.cuda, step[0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if engine is not None:
        engine.release()
    return losses, {key: value.detach().cpu() for key, value in model.named_parameters()}


@pytest.mark.parametrize("home", list(Home), ids=lambda home: home.value)
@pytest.mark.parametrize("name", ["Mlp", "ConvNet", "opt", "llama", "t5", "lstm"])
def test_equal_to_plain(name: str, home: Home) -> None:
    expected_losses, expected = _train(name, None)
    losses, params = _train(name, home)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=1e-4)
    for key, value in expected.items():
        torch.testing.assert_close(params[key], value, rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_trainer_fits_and_leaves_nothing(placement: str, precision: str) -> None:
    before = _allocated()
    module = Module("opt")
    strategy = GeminiStrategy(placement=placement)
    first = trainer(strategy, accelerator="cuda", devices=1, precision=precision, gradient_clip_val=1.0)
    first.fit(module, loader("opt"), loader("opt"))
    assert isinstance(first.precision_plugin, GeminiPrecision)
    assert module.losses[-1] < module.losses[0]
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in module.parameters())
    del first
    assert _allocated() <= before + 2**20  # cuBLAS keeps a workspace


_SCALARS = Adam().scalars(
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True}, {}
)


def _operands(kind: str, numel: int, clip: float) -> Operands:
    """Of a parameter in bf16, or in fp16 for ``"half"``, with a master of some kind, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    master, grad, first, second = (torch.randn(numel, generator=generator) for _ in range(4))
    dtype = torch.float16 if kind == "half" else torch.bfloat16
    low = torch.zeros(numel, dtype=torch.int16)
    return Operands(
        shard=master.to(dtype),
        master={"split": low, "none": None}.get(kind, master),
        grad=grad.to(dtype),
        states=[first, second.square()],
        factor=torch.tensor(clip),
        seed=7,
    )


def _on_device(operands: Operands) -> Operands:
    cuda: list[Tensor] = [state.cuda() for state in operands.states]
    master, factor = operands.master, operands.factor
    assert isinstance(factor, Tensor)
    return replace(
        operands,
        shard=operands.shard.cuda(),
        master=None if master is None else master.cuda(),
        grad=operands.grad.cuda(),
        states=cuda,
        factor=factor.cuda(),
    )


@pytest.mark.parametrize("kernel", [kernel_for(torch.device("cuda")), TensorKernel(False)], ids=["compiled", "eager"])
@pytest.mark.parametrize("kind", ["split", "fp32", "half", "none"])
def test_an_update_is_that_of_the_cpu_to_rounding(kind: str, kernel: Kernel) -> None:
    for numel in (1, 1000, 2**20 + 64):
        here = _operands(kind, numel, 0.5)
        there = _on_device(here)
        TensorKernel(False).update(Adam(), _SCALARS, here)
        kernel.update(Adam(), _SCALARS, there)
        for mine, theirs in zip(here.states, there.states, strict=True):
            torch.testing.assert_close(theirs.cpu(), mine, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(there.shard.cpu().float(), here.shard.float(), rtol=2**-7, atol=1e-6)


def test_split_and_whole_masters_are_the_same_bits() -> None:
    kernel = kernel_for(torch.device("cuda"))
    split, whole = (_on_device(_operands(kind, 4096, 0.5)) for kind in ("split", "fp32"))
    whole = replace(whole, master=whole.shard.float())
    for _ in range(20):
        for operands in (split, whole):
            kernel.update(Adam(), _SCALARS, operands)
    assert torch.equal(split.shard, whole.shard)


def test_an_update_waits_for_nothing() -> None:
    kernel, operands = kernel_for(torch.device("cuda")), _on_device(_operands("split", 4096, 0.5))
    kernel.update(Adam(), _SCALARS, operands)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.update(Adam(), _SCALARS, operands)
        kernel.square_sum(operands.grad)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _slabs() -> Slabs:
    return Slabs(Tier("host", torch.device("cpu")), pin=True)


def test_slabs_are_pinned_until_they_are_closed() -> None:
    slabs, numel = _slabs(), 3 * 2**18 + 64
    slabs.reserve([4 * numel] * 2, "a test")
    tensors = [slabs.get(numel, torch.float32, "a test"), slabs.get(2 * numel, torch.bfloat16, "a test")]
    assert all(tensor.is_pinned() for tensor in tensors)
    assert slabs.pinned_bytes == slabs.reserved_bytes == 2 * 4 * numel
    for tensor in tensors:
        there = torch.randn(tensor.numel(), device="cuda").to(tensor.dtype)
        tensor.copy_(there)
        assert torch.equal(tensor.cuda(), there)
    slabs.close()
    assert not any(tensor.is_pinned() for tensor in tensors)


def test_memory_that_cannot_be_pinned_is_pageable_and_no_kernel_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_warned", False)
    slabs = _slabs()
    tensor = slabs.get(2**20, torch.float32, "a test")
    with pytest.warns(UserWarning, match=r"again: 4\.00 MiB of host memory cannot be pinned .*already.*CUDA error 712"):
        assert pinning.pin(tensor, slabs, "again") is None
    assert torch.ones(1, device="cuda").add_(1).item() == 2
    slabs.close()


def test_lanes_copy_after_what_was_computed_and_before_what_is() -> None:
    slabs, numel = _slabs(), 2**24
    host, other = (slabs.get(numel, torch.float32, "a test").fill_(3) for _ in range(2))
    fetch, offload = lanes(torch.device("cuda", 0))
    out, into = (torch.empty(numel, device="cuda") for _ in range(2))
    result = torch.zeros((), device="cuda")
    torch.sum(torch.ones(1, device="cuda").fill_(2), dim=0, out=result)  # loads the kernels, which may wait
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # clock cycles, about 0.1 s
        out.fill_(1)
        into.fill_(0)
        with offload.after_compute():
            host.copy_(out, non_blocking=True)
        with fetch.after_compute():
            into.copy_(other, non_blocking=True)
        offloaded, fetched = offload.mark(), fetch.mark()
        assert not offloaded.over()
        assert not fetched.over()
        offloaded.join()
        out.fill_(2)  # not before it is copied
        fetched.join()
        torch.sum(into, dim=0, out=result)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    offloaded.wait()
    assert offloaded.over()
    assert (host == 1).all()
    assert result.item() == 3 * numel
    slabs.close()


def test_the_stopwatch_tells_how_long_compute_waited() -> None:
    device = torch.device("cuda", 0)
    fetch, _ = lanes(device)
    watch = Stopwatch(device)
    torch.cuda.synchronize()
    with fetch.after_compute():
        torch.cuda._sleep(200_000_000)
    with watch.measure():
        fetch.mark().join()
    assert watch.seconds() == 0  # nobody waited for it
    torch.cuda.synchronize()
    waited = watch.seconds()
    assert 0.03 < waited < 1
    with watch.measure():
        fetch.mark().join()
    torch.cuda.synchronize()
    assert watch.seconds() - waited < 0.01


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
