"""Updates in the background under the control of a test: held back, late, failing."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_gemini.core import Engine, Home, UpdatePolicy, shard
from lightning_gemini.core.chunk_update import ChunkUpdate
from lightning_gemini.core.host_updates import HostUpdates, _HostUpdate

WORKER = "gemini-update"

#: Engines that tests have built, and may have left as they are.
BUILT: list[Engine] = []

#: Seconds after which somebody who should have been let go has not been.
PATIENCE = 20.0


#: Threads of engines that other tests of the process have left behind.
_OTHERS: set[threading.Thread] = set()


def note_threads() -> None:
    """Those that live now are of no concern to :func:`threads`."""
    _OTHERS.update(threading.enumerate())


def threads() -> list[str]:
    """The names of this package's threads that have been started since :func:`note_threads`.

    The one that waits for other ranks may take a moment to end.
    """
    for thread in threading.enumerate():
        if thread.name == "gemini-wait" and thread not in _OTHERS:
            thread.join(5.0)
    found = (thread.name for thread in threading.enumerate() if thread not in _OTHERS)
    return sorted(name for name in found if name.startswith("gemini-"))


@contextmanager
def before_updates(call: Callable[[int], None]) -> Iterator[None]:
    """Calls ``call`` with the index of a chunk in the worker, before the chunk is updated there."""
    original = ChunkUpdate.job

    def job(update: ChunkUpdate, rule: Any) -> Callable[[], None]:
        run = original(update, rule)

        def watched() -> None:
            if threading.current_thread().name == WORKER:
                call(update.chunk.index)
            run()

        return watched

    with mock.patch.object(ChunkUpdate, "job", job):
        yield


class Gates:
    """Holds updates back until they are let go; :attr:`begun` are the chunks whose turn has come, in that order."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.closed: set[int] = set()
        self._opened: dict[int, threading.Event] = defaultdict(threading.Event)

    def close(self, *chunks: int) -> None:
        for chunk in chunks:
            self._opened[chunk].clear()
        self.closed.update(chunks)

    def open(self, *chunks: int) -> None:
        """All that are closed, if none are named."""
        for chunk in chunks or tuple(self.closed):
            self.closed.discard(chunk)
            self._opened[chunk].set()

    def pass_through(self, chunk: int) -> None:
        self.begun.append(chunk)
        if chunk in self.closed and not self._opened[chunk].wait(PATIENCE):
            raise TimeoutError(f"chunk {chunk} was waited for though its gate is closed")


@contextmanager
def gated() -> Iterator[Gates]:
    gates = Gates()
    with before_updates(gates.pass_through):
        try:
            yield gates
        finally:
            gates.open()


@contextmanager
def as_late_as_possible() -> Iterator[None]:
    """No update begins before somebody waits for it, or for one after it: who reads without waiting reads old bits."""
    asked: dict[_HostUpdate, threading.Event] = defaultdict(threading.Event)
    run, collect, submit = _HostUpdate.run, HostUpdates._collect, HostUpdates.submit

    def late(update: _HostUpdate) -> None:
        if not asked[update].wait(PATIENCE):
            raise TimeoutError(f"nobody has waited for chunk {update.chunk.index}")
        run(update)

    def collecting(updates: HostUpdates, update: _HostUpdate) -> None:
        for one in tuple(updates._under_way):
            asked[one].set()
            if one is update:
                break
        collect(updates, update)
        asked.pop(update, None)

    def submitting(updates: HostUpdates, job: Callable[[], None]) -> Any:
        for one in updates._under_way:  # whoever waits for the job waits for these
            asked[one].set()
        return submit(updates, job)

    patches = ((_HostUpdate, "run", late), (HostUpdates, "_collect", collecting), (HostUpdates, "submit", submitting))
    with ExitStack() as stack:
        for owner, name, other in patches:
            stack.enter_context(mock.patch.object(owner, name, other))
        yield


class Mlp(nn.Module):
    """Layers with names, one after the other: on one rank each is a chunk of its own if chunks are small."""

    def __init__(self, layers: int = 4, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.layers[0].bias.dtype)
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x


#: Elements of a chunk that holds one layer of :class:`Mlp`.
ONE_LAYER = 384


def built(
    make: Callable[[Any], torch.optim.Optimizer] | None = None, layers: int = 4, **options: Any
) -> tuple[Engine, torch.optim.Optimizer]:
    """An engine with one layer in each chunk, which live in host memory, and its optimizer."""
    model = Mlp(layers)
    optimizer = (make or adamw)(model.parameters())
    options = {"home": Home.HOST, "chunk_size": ONE_LAYER, **options}
    BUILT.append(shard(model, [optimizer], **options))
    return BUILT[-1], optimizer


def release_all() -> None:
    """What no test has released."""
    while BUILT:
        BUILT.pop().release(keep_weights=False)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def batch(step: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(step))


def loss_of(engine: Engine, step: int) -> Tensor:
    with engine.forward():
        return engine.model(batch(step)).float().square().mean()


def train(
    engine: Engine, optimizer: torch.optim.Optimizer, step: int, ready: Callable[[], object] = lambda: None
) -> float:
    """One step; ``ready`` is called before the update, when those before it are over."""
    loss = loss_of(engine, step)
    with engine.backward():
        loss.backward()
    ready()
    optimizer.step()
    return loss.item()


def weights(engine: Engine) -> list[Tensor]:
    with engine.summon(exact=True):
        return [param.detach().clone() for param in engine.model.parameters()]


def at_once(steps: int, then: Callable[[Engine, torch.optim.Optimizer], Any] = lambda *_: None, **options: Any) -> Any:
    """What ``then`` says after so many steps without overlap; the weights by default."""
    engine, optimizer = built(update=UpdatePolicy(overlap=False), **options)
    for step in range(steps):
        train(engine, optimizer, step)
    return then(engine, optimizer) or weights(engine)
