"""The ways to save and to load one training state: this package's, torch's own, DCP's and safetensors'."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.optim import AdamW

from benchmarks.contender import LEARNING_RATE, Entry
from benchmarks.workload import Workload
from lightning_gemini.checkpoint import CheckpointReader, hashing, load, load_checkpoint, save, save_checkpoint
from lightning_gemini.checkpoint.flat import FlatTensor, Run, Source
from lightning_gemini.checkpoint.state import flat_states, flat_weights
from lightning_gemini.core import DtypePolicy, Engine, Home, shard

GEMINI, AGAIN, BARE, SPLIT = "gemini", "gemini A/A", "gemini without checksums", "gemini bf16, split masters"
FILES, DCP, TORCH, TORCH_SYNCED = "gemini, tensors alone", "DCP", "torch.save", "torch.save, synced"
SAFETENSORS = "safetensors, synced"

#: Everybody, in the order of the tables.
NAMES = (GEMINI, AGAIN, BARE, SPLIT, FILES, DCP, TORCH, TORCH_SYNCED, SAFETENSORS)

#: bf16 training whose masters are in the low halves of the parameters: on the disk it is fp32 all the same.
MIXED = DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32)

_WEIGHTS = "weights."


@dataclass
class Saver:
    """One way, with the state that it saves and loads.

    Attributes:
        folder: where its files go.
        write: saves to a path that does not exist.
        read: loads from there: weights to where they were, optimizer states into memory that is made for them.
        forget: drops the optimizer states that were loaded or trained, as before a run is resumed.
        synced: whether the bytes are on the disk when ``write`` returns.
        saves: how many there were.
    """

    entry: Entry
    folder: Path
    write: Callable[[Path], None]
    read: Callable[[Path], None]
    forget: Callable[[], None]
    synced: bool = True
    saves: int = 0

    @property
    def path(self) -> Path:
        """Of the last save; for the ways that make a file on each rank the beginning of their names."""
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.entry.name)
        return self.folder / f"{slug}.{self.saves}"

    def save(self) -> float:
        """Saves beside the save before."""
        self.saves += 1
        self.write(self.path)
        return 0.0

    def load(self) -> float:
        """Loads what was saved last."""
        self.read(self.path)
        return 0.0

    def tidy(self) -> None:
        """Brings to the disk what is not there yet, and removes the last save; all ranks call."""
        dist.barrier()
        if dist.get_rank() == 0:
            for path in self._files():
                if not self.synced and path.is_file():
                    _sync(path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            _sync(self.folder)  # what removing costs is not to be paid by the next one's fsync
        dist.barrier()

    def settle(self) -> None:
        """Brings to the disk what a save has left to the system; rank 0 does it for all."""
        dist.barrier()
        if not self.synced and dist.get_rank() == 0:
            for path in self._files():
                _sync(path)
        dist.barrier()

    def nbytes(self) -> int:
        """Of the last save's files."""
        files = [file for path in self._files() for file in (path.rglob("*") if path.is_dir() else [path])]
        return sum(file.stat().st_size for file in files if file.is_file())

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.path.name}*"))


def trained(workload: Workload, policy: DtypePolicy, steps: int = 1) -> tuple[nn.Module, Engine]:
    """A model in chunks in host memory, and its engine, after some steps of AdamW."""
    model, batch = workload.build(), workload.batch()
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    several = dist.get_world_size() > 1
    engine = shard(
        model,
        [optimizer],
        group=dist.group.WORLD if several else None,
        reduce_group=dist.new_group() if several else None,
        home=Home.HOST,
        policy=policy,
    )
    for _ in range(steps):
        workload.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, engine


def host_group() -> dist.ProcessGroup | None:
    """The ranks, ``None`` for one alone."""
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def flat_tensors(engine: Engine) -> dict[str, FlatTensor]:
    """Weights and optimizer states as they are spread over the ranks; what checkpoints hold but for a few numbers."""
    with engine.saving():
        found: dict[str, object] = {f"{_WEIGHTS}{index}": one for index, one in flat_weights(engine.store).items()}
    for chunks in engine.optimizers:
        for index, state in flat_states(engine.store, chunks).items():
            found.update({f"states.{index}.{key}": one for key, one in state.items()})
    return {name: one for name, one in found.items() if isinstance(one, FlatTensor)}


def plain_tensors(engine: Engine) -> dict[str, Tensor]:
    """Copies of this rank's blocks of :func:`flat_tensors`, each an ordinary tensor in memory of its own."""
    return {
        f"{name}@{dist.get_rank()}.{number}": flat.__get_tensor_shard__(MetadataIndex(name, block.offsets)).clone()
        for name, flat in flat_tensors(engine).items()
        for number, block in enumerate(flat.__create_chunk_list__())
    }


def engine_saver(name: str, workload: Workload, policy: DtypePolicy, folder: Path) -> Saver:
    """This package as a user calls it."""
    engine = trained(workload, policy)[1]

    def write(path: Path) -> None:
        save_checkpoint(engine, path, group=host_group())

    def read(path: Path) -> None:
        load_checkpoint(engine, path)

    def forget() -> None:
        nonlocal engine
        engine.release(keep_weights=False)
        engine = trained(workload, policy, steps=0)[1]

    return Saver(Entry(name, "gemini"), folder, write, read, forget)


def bare_saver(workload: Workload, folder: Path) -> Saver:
    """The same with nothing in the place of checksums."""
    saver = engine_saver(BARE, workload, DtypePolicy(), folder)
    write, read = saver.write, saver.read

    def bare_write(path: Path) -> None:
        with _without_checksums():
            write(path)

    def bare_read(path: Path) -> None:
        with _without_checksums():
            read(path)

    saver.write, saver.read = bare_write, bare_read
    return saver


def files_saver(engine: Engine, folder: Path) -> Saver:
    """This package's files alone, without what else belongs to resuming: just what DCP is asked for."""
    held: dict[str, FlatTensor] = {}

    def write(path: Path) -> None:
        save(path, flat_tensors(engine), {}, {}, host_group())

    def read(path: Path) -> None:
        held.clear()
        held.update(_destination(engine))
        load(CheckpointReader(path), held, host_group(), direct=True)

    return Saver(Entry(FILES, "gemini"), folder, write, read, held.clear)


def dcp_saver(engine: Engine, folder: Path) -> Saver:
    """torch.distributed.checkpoint with its own files, which it synchronises, for the same flat tensors."""
    held: dict[str, FlatTensor] = {}

    def write(path: Path) -> None:
        dcp.save(flat_tensors(engine), storage_writer=dcp.FileSystemWriter(path))

    def read(path: Path) -> None:
        held.clear()
        held.update(_destination(engine))
        dcp.load(dict(held), storage_reader=dcp.FileSystemReader(path))

    return Saver(Entry(DCP, "gemini"), folder, write, read, held.clear)


def torch_saver(tensors: dict[str, Tensor], folder: Path, synced: bool) -> Saver:
    """``torch.save`` of a dictionary; on several ranks each makes a file of its own part, which no other size loads."""
    state = dict(tensors)

    def write(path: Path) -> None:
        with open(_of_rank(path), "wb") as file:
            torch.save(state, file)
            if synced:
                file.flush()
                os.fsync(file.fileno())

    def read(path: Path) -> None:
        _adopt(state, torch.load(_of_rank(path), weights_only=True))

    return Saver(Entry(TORCH_SYNCED if synced else TORCH, "plain"), folder, write, read, lambda: _forget(state), synced)


def safetensors_saver(tensors: dict[str, Tensor], folder: Path) -> Saver:
    """``save_file`` of a dictionary, synchronised; on several ranks as :func:`torch_saver`."""
    state = dict(tensors)

    def write(path: Path) -> None:
        save_file(state, _of_rank(path))
        _sync(_of_rank(path))

    def read(path: Path) -> None:
        _adopt(state, load_file(_of_rank(path)), mapped=True)

    return Saver(Entry(SAFETENSORS, "plain"), folder, write, read, lambda: _forget(state))


def make_savers(names: Sequence[str], workload: Workload, folder: Path) -> list[Saver]:
    """Those of ``names``; all save states of the same shapes and dtypes, with the values of the same training."""
    makers: dict[str, Callable[[], Saver]] = {
        GEMINI: lambda: engine_saver(GEMINI, workload, DtypePolicy(), folder),
        AGAIN: lambda: engine_saver(AGAIN, workload, DtypePolicy(), folder),
        BARE: lambda: bare_saver(workload, folder),
        SPLIT: lambda: engine_saver(SPLIT, workload, MIXED, folder),
        FILES: lambda: files_saver(trained(workload, DtypePolicy())[1], folder),
        DCP: lambda: dcp_saver(trained(workload, DtypePolicy())[1], folder),
        TORCH: lambda: torch_saver(_plain(workload), folder, synced=False),
        TORCH_SYNCED: lambda: torch_saver(_plain(workload), folder, synced=True),
        SAFETENSORS: lambda: safetensors_saver(_plain(workload), folder),
    }
    return [makers[name]() for name in names]


def _plain(workload: Workload) -> dict[str, Tensor]:
    engine = trained(workload, DtypePolicy())[1]
    tensors = plain_tensors(engine)
    engine.release(keep_weights=False)
    return tensors


def _destination(engine: Engine) -> dict[str, FlatTensor]:
    """The weights where they are, and memory for the states."""
    return {name: flat if name.startswith(_WEIGHTS) else _unfilled(flat) for name, flat in flat_tensors(engine).items()}


def _unfilled(flat: FlatTensor) -> FlatTensor:
    runs = [Run(run.start, run.numel, Source(torch.empty(run.numel, dtype=flat.dtype)), 0) for run in flat.runs]
    return FlatTensor(flat.shape, flat.stride(), flat.dtype, runs)


def _adopt(state: dict[str, Tensor], found: dict[str, Tensor], mapped: bool = False) -> None:
    """What ``load_state_dict`` does: a module copies weights to where they were, an optimizer takes states over.

    What is a file, ``mapped``, of which nothing has been read yet, is copied instead.
    """
    for name, value in found.items():
        if name.startswith(_WEIGHTS):
            state[name].copy_(value)
        else:
            state[name] = value.clone() if mapped else value


def _forget(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if not name.startswith(_WEIGHTS)]:
        del state[name]


def _of_rank(path: Path) -> Path:
    return path.with_name(f"{path.name}-{dist.get_rank()}")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _NoChecksum:
    def update(self, data: object) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 16


@contextmanager
def _without_checksums() -> Iterator[None]:
    xxhash = hashing.xxhash
    hashing.xxhash = SimpleNamespace(xxh3_64=_NoChecksum, xxh3_64_hexdigest=lambda _: "0" * 16)  # type: ignore[assignment]
    try:
        yield
    finally:
        hashing.xxhash = xxhash
