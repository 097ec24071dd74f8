"""How much of the update in host memory hides behind the next forward: steps with it in the background and without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.contender import LEARNING_RATE, Contender, Entry
from benchmarks.estimate import Estimate, median, ratio
from benchmarks.ranks import run_ranks
from benchmarks.result import Record, Result, Table
from benchmarks.rounds import Series, Timing, time_rounds
from benchmarks.settings import Settings
from benchmarks.workload import Opt
from lightning_gemini.core import DtypePolicy, Engine, Home, UpdatePolicy, shard

#: The device's forward, in the time that the update takes; its backward takes twice that.
FORWARDS = (0.5, 1.0, 2.0)

_AT_ONCE = "at once"
_MIXED = DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32)


@dataclass(frozen=True)
class Device:
    """Units whose computing is somebody else's, as on a GPU: the host waits for it and does nothing.

    Attributes:
        units: each with a weight of ``numel`` elements.
        forward: seconds for all of them; the backward takes twice as long.
    """

    units: int = 12
    numel: int = 2**20
    forward: float = 0.0

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(_Unit(self.numel, self.forward / self.units) for _ in range(self.units)))

    def batch(self) -> Tensor:
        return torch.ones(8, requires_grad=True)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch.to(next(model.parameters()).dtype)).float().sum()  # type: ignore[no-any-return]


class _Unit(nn.Module):
    def __init__(self, numel: int, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(numel))
        self._seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        return _Elsewhere.apply(x, self.weight, self._seconds)  # type: ignore[no-any-return, no-untyped-call]


class _Elsewhere(torch.autograd.Function):
    """``x`` plus a little of the weight, after a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.shape, ctx.seconds = weight.shape, seconds
        time.sleep(seconds)
        return x + 1e-3 * weight[: len(x)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        time.sleep(2 * ctx.seconds)
        return grad, torch.full(ctx.shape, 1e-3, dtype=grad.dtype), None


def run(settings: Settings, ranks: int) -> Result:
    """Times steps of a device that computes by itself, and of an OPT that computes on the cores of the update."""
    threads = settings.threads(ranks)
    timing = Timing(rounds=settings.pairs)
    device = Device(units=4, numel=2**12) if settings.brief else Device()
    rows = run_ranks(_measure, ranks, threads, device, settings.opt, timing, settings.seed)[0]
    record = {
        "benchmark": "overlap",
        "ranks": ranks,
        "threads": threads,
        "workloads": [asdict(device), asdict(settings.opt)],
        "timing": asdict(timing),
        "rows": rows,
    }
    return Result(_table(rows, ranks, threads), record)


def _measure(device: Device, opt: Opt, timing: Timing, seed: int) -> list[Record]:
    update = _update_seconds(device, timing)
    rows = []
    for share in FORWARDS:
        work = Device(device.units, device.numel, share * update)
        rows.append(_compare(f"a device whose forward takes {share:g} updates", work, timing, seed))
    return [*rows, _compare("an OPT on the cores of the update", opt, timing, seed)]


def _update_seconds(device: Device, timing: Timing) -> float:
    """What one update takes on the slowest rank, with nothing beside it."""
    contender = _prepare(_AT_ONCE, device)
    seconds = []
    for _ in range(timing.warmup + 5):
        contender.backward()
        dist.barrier()
        began = time.perf_counter()
        contender.optimizer.step()
        seconds.append(time.perf_counter() - began)
        contender.optimizer.zero_grad()
    _release(contender)
    slowest = torch.tensor(median(seconds[timing.warmup :]))
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def _compare(name: str, workload: Device | Opt, timing: Timing, seed: int) -> Record:
    contenders = [_prepare(way, workload) for way in (_AT_ONCE, "at once, A/A", "in the background")]
    series = {one.name: one for one in time_rounds(contenders, Contender.train, timing, seed)}
    hidden = _engine(contenders[-1]).timeline().update_hidden_share
    for contender in contenders:
        _release(contender)
    return {
        "name": name,
        "hidden_share": hidden,
        "contenders": [_summary(one, series[_AT_ONCE]) for one in series.values()],
    }


def _summary(one: Series, reference: Series) -> Record:
    return {
        "name": one.name,
        "seconds": list(one.seconds),
        "median_seconds": median(one.seconds),
        "loss": one.loss,
        "ratio": asdict(ratio(one.seconds, reference.seconds)),
    }


def _prepare(way: str, workload: Device | Opt) -> Contender:
    model, batch = workload.build(), workload.batch()
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    several = dist.get_world_size() > 1
    engine = shard(
        model,
        [optimizer],
        group=dist.group.WORLD if several else None,
        reduce_group=dist.new_group() if several else None,
        placement="host",
        chunk_size=workload.numel if isinstance(workload, Device) else "auto",
        policy=_MIXED,
        update=UpdatePolicy(overlap=not way.startswith(_AT_ONCE)),
    )
    return Contender(
        Entry(way, "gemini", bf16=True, home=Home.HOST), model, optimizer, lambda: workload.loss(model, batch), engine
    )


def _engine(contender: Contender) -> Engine:
    assert contender.engine is not None
    return contender.engine


def _release(contender: Contender) -> None:
    _engine(contender).release(keep_weights=False)


def _table(rows: Sequence[Record], ranks: int, threads: int) -> Table:
    cells = []
    for row in rows:
        by_name = {one["name"]: one for one in row["contenders"]}
        hidden = row["hidden_share"]
        cells.append(
            (
                row["name"],
                *(f"{1e3 * one['median_seconds']:.1f}" for name, one in by_name.items() if "A/A" not in name),
                *(Estimate(**one["ratio"]).format() for name, one in by_name.items() if name != _AT_ONCE),
                "-" if hidden is None else f"{hidden:.0%}",
            )
        )
    return Table(
        f"The update in the background, {ranks} rank(s), {threads} thread(s) each",
        "Everything lives in host memory. Milliseconds of a whole step, medians; ratios of the pairs to the update at "
        "once with their 95% bootstrap intervals; and how much of the update nobody waited for, by the timeline of one "
        "step. A device computes while the host waits, its backward for twice its forward; only the forward is behind "
        "an update, so a forward as long as the update hides all of it at best: 1 of 4 parts of the step.",
        ("what computes", "at once, ms", "in the background, ms", "A/A, ratio", "background, ratio", "hidden"),
        tuple(cells),
    )
