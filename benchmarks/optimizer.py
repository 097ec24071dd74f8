"""What an AdamW step costs in mixed precision: bf16 gradients and parameters, fp32 arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.estimate import Estimate, estimate, median, ratio
from benchmarks.ranks import run_ranks
from benchmarks.result import Record, Result, Table
from benchmarks.rounds import Series, Timing, time_rounds
from benchmarks.settings import Settings
from lightning_gemini.optim.adam import Adam
from lightning_gemini.optim.kernel import Kernel, kernel_for
from lightning_gemini.optim.masters import low_half, round_to_compute
from lightning_gemini.optim.operands import Operands
from lightning_gemini.optim.tensor_kernel import TensorKernel

REFERENCE = "fused, casts"
COPY = "copy of 28 bytes"

_NUMEL = 20_000_000
_BRIEF_NUMEL = 2**16
_LEARNING_RATE = 1e-4
_BF16 = torch.bfloat16


@dataclass(frozen=True)
class Entry:
    """One way to make a step.

    Attributes:
        nbytes: what it reads and writes, per parameter; what is read and written counts twice.
    """

    name: str
    nbytes: int


@dataclass
class Contender:
    """An :class:`Entry` with its tensors."""

    entry: Entry
    step: Callable[[], object]
    device: torch.device

    def train(self) -> float:
        """One step, to its end."""
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 0.0


def run(settings: Settings, ranks: int) -> Result:
    """Times steps of AdamW, on a GPU if there is one."""
    n = _BRIEF_NUMEL if settings.brief else _NUMEL
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = settings.threads(ranks)
    timing = Timing(rounds=settings.pairs)
    nbytes, series = run_ranks(_measure, ranks, threads, n, device, timing, settings.seed)[0]
    contenders = summarise(series, nbytes, n)
    record = {
        "benchmark": "optimizer",
        "ranks": ranks,
        "threads": threads,
        "workload": {"parameters": n, "device": device},
        "timing": asdict(timing),
        "contenders": contenders,
    }
    return Result(_table(contenders, n, device, threads), record)


def summarise(series: Sequence[Series], nbytes: dict[str, int], n: int) -> list[Record]:
    """Per contender: its time as a ratio to the reference's, and its bandwidth as one to the copy's."""
    seconds = {one.name: one.seconds for one in series}
    return [
        {
            "name": one.name,
            "seconds": list(one.seconds),
            "median_seconds": median(one.seconds),
            "bytes_per_parameter": nbytes[one.name],
            "parameters_per_second": n / median(one.seconds),
            "ratio": asdict(ratio(one.seconds, seconds[REFERENCE])),
            "bandwidth_to_copy": asdict(
                estimate(
                    [
                        nbytes[one.name] * copy / (nbytes[COPY] * own)
                        for own, copy in zip(one.seconds, seconds[COPY], strict=True)
                    ]
                )
            ),
        }
        for one in series
    ]


def contenders(n: int, device: torch.device) -> list[Contender]:
    """Everybody, with ``n`` parameters each; the gradient is the same tensor."""
    grad = torch.randn(n, device=device).to(_BF16)
    ours = kernel_for(device)
    steps: list[tuple[str, int, Callable[[], object]]] = [
        (REFERENCE, 40, _torch_step(grad, fused=True)),
        ("fused, casts A/A", 40, _torch_step(grad, fused=True)),
        ("fused, fresh casts", 40, _torch_step(grad, fresh=True, fused=True)),
        ("foreach, casts", 40, _torch_step(grad, foreach=True)),
        (f"{ours.name}, fp32 master", 28, _kernel_step(ours, grad, torch.float32, torch.float32)),
        (f"{ours.name}, split", 26, _kernel_step(ours, grad, torch.int16, torch.float32)),
        (f"{ours.name}, split, bf16 states", 18, _kernel_step(ours, grad, torch.int16, _BF16)),
        ("eager, fp32 master", 28, _kernel_step(TensorKernel(compiled=False), grad, torch.float32, torch.float32)),
        *((f"copy of {nbytes} bytes", nbytes, _copy(grad, nbytes)) for nbytes in (28, 26)),
    ]
    return [Contender(Entry(name, nbytes), step, device) for name, nbytes, step in steps]


def _torch_step(grad: Tensor, fresh: bool = False, **implementation: bool) -> Callable[[], object]:
    """Torch's optimizer on fp32 masters, between two casts."""
    master = nn.Parameter(torch.randn(grad.shape, device=grad.device))
    shard = master.detach().to(_BF16)
    optimizer = AdamW([master], lr=_LEARNING_RATE, **implementation)
    master.grad = None if fresh else torch.empty_like(master)

    def step() -> None:
        if master.grad is None:
            master.grad = grad.float()
        else:
            master.grad.copy_(grad)
        optimizer.step()
        shard.copy_(master.detach())
        if fresh:
            master.grad = None

    return step


def _kernel_step(
    kernel: Kernel, grad: Tensor, master_dtype: torch.dtype, state_dtype: torch.dtype
) -> Callable[[], object]:
    rule, state = Adam(), {}
    group = AdamW([torch.zeros(1)], lr=_LEARNING_RATE).param_groups[0]
    weights = torch.randn(grad.shape, device=grad.device)
    shard = round_to_compute(weights, torch.empty_like(grad))
    split = master_dtype == torch.int16
    master = low_half(weights, torch.empty_like(grad, dtype=torch.int16)) if split else weights

    def step() -> None:
        scalars = rule.scalars(group, state)
        states = rule.states(state, shard, state_dtype)
        kernel.update(rule, scalars, Operands(shard, grad, master, states, seed=int(state["step"])))

    return step


def _copy(grad: Tensor, nbytes: int) -> Callable[[], object]:
    """Reads half of the bytes and writes the other half."""
    source = torch.zeros(grad.numel() * nbytes // 2, dtype=torch.uint8, device=grad.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _measure(n: int, device: str, timing: Timing, seed: int) -> tuple[dict[str, int], list[Series]]:
    everybody = contenders(n, torch.device(device))
    series = time_rounds(everybody, Contender.train, timing, seed)  # type: ignore[arg-type]
    return {one.entry.name: one.entry.nbytes for one in everybody}, series


def _table(contenders: Sequence[Record], n: int, device: str, threads: int) -> Table:
    rows = [
        (
            c["name"],
            "1" if c["name"] == REFERENCE else Estimate(**c["ratio"]).format(),
            f"{c['parameters_per_second'] / 1e9:.2f}",
            str(c["bytes_per_parameter"]),
            f"{c['parameters_per_second'] * c['bytes_per_parameter'] / 1e9:.1f}",
            "1" if c["name"] == COPY else Estimate(**c["bandwidth_to_copy"]).format(),
        )
        for c in contenders
    ]
    where = f"{threads} thread(s)" if device == "cpu" else device
    return Table(
        f"AdamW on {n / 1e6:.3g}M parameters, bf16 with fp32 arithmetic, {where}",
        f"Median of {len(contenders[0]['seconds'])} interleaved rounds; ratios are medians of pairs with 95% bootstrap "
        f"intervals: time to `{REFERENCE}`, bandwidth to `{COPY}`. `A/A` is the reference again: what it differs from "
        "1 by is noise. Bytes are what a step has to read and write.",
        ("contender", "time ratio", "G params/s", "bytes/param", "GB/s", "of the copy"),
        tuple(rows),
    )
