"""Trains one job in this process and tells what it took; see :mod:`benchmarks.child` for the process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from benchmarks.job import Job, Machine
from benchmarks.peer import build_plain, shard_fully
from benchmarks.rates import Extent, measure_rates
from benchmarks.result import Record
from lightning_gemini.budgets import Budgets
from lightning_gemini.core import DtypePolicy, Engine, Home, shard
from lightning_gemini.core.machine import total_bytes
from lightning_gemini.core.update_policy import UpdatePolicy

Say = Callable[[Record], None]

LEARNING_RATE = 1e-4
MAX_NORM = 1.0
_KIND = "training_step"
_HOST_RESERVE = 4 * 2**30  # bytes of host memory for Python, CUDA and the system


@dataclass
class Trainee:
    """A model that is ready to train."""

    job: Job
    model: nn.Module
    optimizer: Optimizer
    batches: list[Tensor]
    device: torch.device
    engine: Engine | None = None
    losses: list[float] = field(default_factory=list)
    device_peak: int = 0

    def step(self, clipping: bool) -> None:
        """One optimizer step as a user writes it; the device has nothing left to do when it is over."""
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(self.batches):
            with self._micro_batch(last=number == len(self.batches) - 1):
                loss = self.job.shape.loss(self.model, batch)
            loss = loss / len(self.batches)
            total += loss.detach()
            with self._backward(last=number == len(self.batches) - 1):
                loss.backward()
        if clipping:
            self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total.item())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.device_peak = max(self.device_peak, torch.cuda.max_memory_allocated(self.device))
        elif self.engine is not None:
            self.device_peak = self.engine.store.device.peak

    def warm_up(self, say: Say, machine: Machine) -> None:
        """Steps without a clock."""
        for number in range(machine.warmup):
            self.step(self.job.clipping)
            say({"steps": number + 1, "device_peak": self.device_peak})

    @contextmanager
    def _micro_batch(self, last: bool) -> Iterator[None]:
        if self.engine is None:
            with _autocast(self.device) if self.job.way == "plain" else nullcontext():
                yield
            return
        with nullcontext() if last else self.engine.accumulate(), self.engine.forward(_KIND):
            yield

    @contextmanager
    def _backward(self, last: bool) -> Iterator[None]:
        with nullcontext() if last or self.engine is None else self.engine.accumulate():
            yield

    def _clip(self) -> None:
        if self.engine is not None:
            self.engine.clip_grad_norm(self.optimizer, MAX_NORM)
        else:
            clip_grad_norm_(self.model.parameters(), MAX_NORM)


def describe(say: Say, device: str) -> Record:
    """The device's name and its bytes of memory; a process that has asked holds some of them for CUDA."""
    if device == "cpu":
        return {"name": "the CPU, emulating a device", "total": None}
    return {"name": torch.cuda.get_device_name(0), "total": total_bytes(torch.device("cuda", 0))}


def rates(say: Say, device: str, extent: Extent) -> Record:
    """The machine's rates, measured here."""
    return vars(measure_rates(torch.device(device), extent))


def train(say: Say, job: Job, machine: Machine) -> Record:
    """Trains ``job``: first without a clock, then with one, then in pairs with clipping and without.

    Returns:
        ``seconds`` (by timed step), ``clip_pairs`` (seconds with and without), ``losses``, ``device_peak``,
        ``reserved``, ``pinned`` and ``fragments`` in bytes, ``chunks`` (bytes of all chunks), ``plan`` (what a step
        fetches and offloads in bytes, and the parameters that are updated on the host), ``moved`` (what the counters
        say of the same), ``hidden`` (the share of the host's update that nobody waited for), ``report`` and
        ``timeline``, a text in JSON.
    """
    device = torch.device(machine.device)
    with _last_words(say, device):
        trainee = make(job, machine)
        trainee.warm_up(say, machine)
        return _measure(say, trainee, machine)


def _measure(say: Say, trainee: Trainee, machine: Machine) -> Record:
    job = trainee.job
    before = _moved(trainee.engine)
    seconds: list[float] = []
    start = time.perf_counter()
    for _ in range(machine.steps):
        trainee.step(job.clipping)
        seconds.append(time.perf_counter() - start)
        start += seconds[-1]
        say({"device_peak": trainee.device_peak})
    moved = {key: (value - before[key]) // machine.steps for key, value in _moved(trainee.engine).items()}
    pairs = _clip_pairs(trainee)
    return {
        "seconds": seconds,
        "clip_pairs": pairs,
        "losses": trainee.losses,
        "device_peak": trainee.device_peak,
        "plan": planned(trainee.engine, job.accumulation),
        "moved": moved,
        **_memory(trainee),
        "hidden": hidden_share(trainee.engine),
        "report": "" if trainee.engine is None else trainee.engine.memory_report(),
        "timeline": trainee.engine.timeline().to_json() if trainee.engine is not None and job.draw else "",
    }


def try_steps(say: Say, job: Job, machine: Machine) -> Record:
    """Trains a few steps, with the update of the last one over: whether the model fits."""
    with _last_words(say, torch.device(machine.device)):
        trainee = make(job, machine)
        trainee.warm_up(say, machine)
        if trainee.engine is not None:
            with trainee.engine.summon(trainee.model.model.decoder.final_layer_norm):  # type: ignore[union-attr, arg-type]
                pass  # waits for what is under way
    return {"losses": trainee.losses, "device_peak": trainee.device_peak, **_memory(trainee)}


def make(job: Job, machine: Machine) -> Trainee:
    """Builds the model and makes it ready."""
    torch.manual_seed(0)
    device = torch.device(machine.device)
    model, engine = job.shape.build(), None
    if job.way == "plain":
        build_plain(model, device)
    elif job.way == "fsdp2":
        shard_fully(model, job.shape.blocks(model), device)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    if job.way == "gemini":
        engine = _shard_in_chunks(model, optimizer, job, machine)
    batches = [job.shape.batch(job.rows, number, device) for number in range(job.accumulation)]
    return Trainee(job, model, optimizer, batches, device, engine)


def planned(engine: Engine | None, accumulation: int) -> Record | None:
    """What one optimizer step moves between host and device by its plans, and what is updated on the host."""
    if engine is None:
        return None
    plans = {one.trace.kind: one.plan for one in engine._schedule.playbook.known if one.plan is not None}
    parts = [(plans.get(_KIND), 1), (plans.get(f"{_KIND}, accumulating"), accumulation - 1)]
    hosted = [chunk for chunk in engine.store.chunks if chunk.home is Home.HOST and chunk.spec.kind.updated]
    return {
        "fetched": sum(plan.fetched * times for plan, times in parts if plan is not None),
        "offloaded": sum(plan.offloaded * times for plan, times in parts if plan is not None),
        "hosted": sum(chunk.spec.used for chunk in hosted),
    }


def hidden_share(engine: Engine | None) -> float | None:
    """How much of the update on the host nobody has waited for; ``None`` where nothing was updated behind a step."""
    return None if engine is None else engine.timeline().update_hidden_share


def _shard_in_chunks(model: nn.Module, optimizer: Optimizer, job: Job, machine: Machine) -> Engine:
    device = torch.device(machine.device)
    budgets = Budgets(machine.device_memory or "auto", machine.host_memory or "auto")
    host = budgets.host_bytes(1)
    if machine.host_memory is None and host is not None:
        host = max(host - _HOST_RESERVE, host // 2)
    state = torch.bfloat16 if job.bf16_states else torch.float32
    return shard(
        model,
        [optimizer],
        device=torch.device("cuda", 0) if device.type == "cuda" else device,
        placement=job.placement,
        device_memory=budgets.device_bytes(device),
        host_memory=host,
        policy=DtypePolicy(torch.bfloat16, master="split", state=state),
        update=UpdatePolicy(job.update, overlap=job.overlap),
    )


@contextmanager
def _last_words(say: Say, device: torch.device) -> Iterator[None]:
    """Says how much the device had given out at the most if what is inside fails."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
    try:
        yield
    except BaseException:
        if device.type == "cuda":
            say({"device_peak_at_failure": torch.cuda.max_memory_allocated()})
        raise


def _clip_pairs(trainee: Trainee) -> list[tuple[float, float]]:
    """Seconds of a step with clipping and of one without, in turn.

    Each is the second of its kind in a row: the first one may still share the machine with the update of the other.
    """
    pairs = []
    for number in range(trainee.job.clip_pairs):
        seconds = {}
        for clipping in (True, False) if number % 2 else (False, True):
            trainee.step(clipping)
            start = time.perf_counter()
            trainee.step(clipping)
            seconds[clipping] = time.perf_counter() - start
        pairs.append((seconds[True], seconds[False]))
    return pairs


def _moved(engine: Engine | None) -> dict[str, int]:
    counters = None if engine is None else engine.counters
    return {
        "fetched": 0 if counters is None else counters.fetched_bytes,
        "offloaded": 0 if counters is None else counters.offloaded_bytes,
    }


def _memory(trainee: Trainee) -> Record:
    """Bytes after training: pinned, reserved by the allocator, and of these those that it could not give back."""
    engine, cuda = trainee.engine, trainee.device.type == "cuda"
    record: Record = {
        "chunks": None if engine is None else sum(chunk.nbytes for chunk in engine.layout.chunks),
        "pinned": None,
        "reserved": None,
        "fragments": None,
    }
    if engine is not None:
        record["pinned"] = engine.store.slabs.pinned_bytes
    if cuda:
        if engine is None:
            record["pinned"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak")
        record["reserved"] = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()  # what activations had: whole segments, which anybody could have
        record["fragments"] = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return record


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)
