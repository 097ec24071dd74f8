"""Sharded checkpoints: what is saved is loaded, in whatever pieces; what is damaged or not ours is refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from lightning_gemini.checkpoint import CheckpointReader, load, open_checkpoint, remove, save
from lightning_gemini.checkpoint.manifest import new_save_id
from lightning_gemini.core.errors import (
    CheckpointError,
    CheckpointWriteError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    NotACheckpointError,
)
from tests.boxed import Boxed, boxed, cut, part
from tests.ranks import run_ranks

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.complex64, torch.complex128, torch.bool, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def some(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Arbitrary bits: NaNs of every kind, too."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def small(path: Path | str, **about: Any) -> dict[str, Tensor]:
    """Saves a small checkpoint with a file of each kind; its tensors."""
    tensors = {"weight": some((6, 5), torch.float32), "half": some((7,), torch.bfloat16), "step": torch.tensor(3)}
    save(path, tensors, {"trainer.pt": bytes(range(100))}, {"epoch": 2, **about})
    return tensors


def files(path: Path) -> dict[str, Path]:
    return {file.name: file for file in path.rglob("*") if file.is_file()}


def loaded(reader: CheckpointReader, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in reader.manifest.tensors.items()}
    load(reader, tensors, group)
    return tensors


# What is saved is loaded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = [(), (1,), (0,), (3, 0, 2), (5, 7), (2, 3, 4, 5), (9, 1)]
    tensors = {f"t{shape}": some(shape, dtype, seed) for seed, shape in enumerate(shapes)}
    tensors["transposed"] = some((4, 6), dtype).t()
    tensors["strided"] = some((5, 8), dtype)[:, ::3]
    tensors["expanded"] = some((1, 4), dtype).expand(3, 4)
    tensors["parameter"] = (
        torch.nn.Parameter(some((3, 3), dtype)) if dtype.is_floating_point or dtype.is_complex else some((2,), dtype)
    )
    save(tmp_path / "c", tensors, {}, {})
    reader = CheckpointReader(tmp_path / "c")
    result = loaded(reader)
    for name, tensor in tensors.items():
        assert same_bits(result[name], tensor.detach()), name
        assert same_bits(reader.tensor(name), tensor.detach()), name
    reader.verify()


def test_views_that_torch_negates_or_conjugates_lazily(tmp_path: Path) -> None:
    tensors = {"conj": some((3, 4), torch.complex64).conj(), "imag": torch.randn(5, dtype=torch.complex64).conj().imag}
    assert tensors["conj"].is_conj()
    assert tensors["imag"].is_neg()
    save(tmp_path / "c", tensors, {}, {})
    reader = CheckpointReader(tmp_path / "c")
    assert same_bits(reader.tensor("conj"), tensors["conj"].resolve_conj())
    assert same_bits(reader.tensor("imag"), tensors["imag"].resolve_neg())


NAMES = ["", " ", "a/b\\c", "../../up", "__metadata__", "ü😀\u2028", 'quote"\n\0', "w[0:2]", "w", "x" * 5000, "a.b.0"]


def test_names_of_any_characters(tmp_path: Path) -> None:
    tensors = {name: torch.full((2,), float(index)) for index, name in enumerate(NAMES)}
    save(tmp_path / "c", tensors, {}, {})
    reader = CheckpointReader(tmp_path / "c")
    assert list(reader.manifest.tensors) == NAMES
    for name, tensor in loaded(reader).items():
        assert torch.equal(tensor, tensors[name])
    with safe_open(files(tmp_path)["rank0.safetensors"], "pt") as file:
        assert sorted(file.keys()) == sorted(f"{name}[0:2]" for name in NAMES)
    with pytest.raises(CheckpointWriteError, match="surrogates not allowed"):
        save(tmp_path / "d", {"\ud800": torch.ones(1)}, {}, {})
    assert not (tmp_path / "d").exists()


def test_safetensors_reads_the_files(tmp_path: Path) -> None:
    tensors = {str(dtype): some((3, 5), dtype) for dtype in DTYPES} | {"scalar": torch.tensor(2.5)}
    save(tmp_path / "c", tensors, {}, {})
    save_id = CheckpointReader(tmp_path / "c").manifest.save_id
    with safe_open(files(tmp_path)["rank0.safetensors"], "pt") as file:
        assert file.metadata() == {"format": "pt", "save_id": save_id, "rank": "0"}
        assert same_bits(file.get_tensor("scalar[]"), tensors["scalar"])
        for dtype in DTYPES:
            tensor = file.get_tensor(f"{dtype}[0:3,0:5]")
            if dtype in (torch.complex128, torch.float8_e4m3fnuz):  # which the format does not have
                tensor = tensor.view(dtype).view(3, 5)
            assert same_bits(tensor, tensors[str(dtype)])


def test_attachments_and_what_is_said_about_it(tmp_path: Path) -> None:
    about = {"nested": {"b": [1, 2.5, None, True], "a": "ü"}, "inf": float("inf"), "7": "seven"}
    save(tmp_path / "c", {}, {"trainer.pt": b"\0\1\2" * 1000, "empty.bin": b""}, about, save_id=None)
    reader = CheckpointReader(tmp_path / "c")
    assert reader.manifest.about == about
    assert sorted(reader.manifest.attachments) == ["empty.bin", "trainer.pt"]
    assert reader.attachment("trainer.pt") == b"\0\1\2" * 1000
    assert reader.attachment("empty.bin") == b""
    with pytest.raises(KeyError):
        reader.attachment("rank0.safetensors")


def test_a_save_takes_the_id_that_it_is_given(tmp_path: Path) -> None:
    save_id = new_save_id()
    save(tmp_path / "c", {"a": torch.ones(1)}, {}, {}, save_id=save_id)
    assert CheckpointReader(tmp_path / "c").manifest.save_id == save_id
    assert sorted(os.listdir(tmp_path / "c")) == [save_id, "checkpoint.json"]
    assert new_save_id() < new_save_id()


def test_load_casts_only_when_asked(tmp_path: Path) -> None:
    small(tmp_path / "c")
    reader = CheckpointReader(tmp_path / "c")
    target = {"weight": torch.zeros(6, 5, dtype=torch.float64), "step": torch.tensor(0), "none": torch.ones(1)}
    with pytest.raises(IncompatibleCheckpointError) as error:
        load(reader, {**target, "half": torch.zeros(8, dtype=torch.bfloat16)})
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'c'} does not fit:",
        "  weight: is torch.float64, in the checkpoint torch.float32",
        "  none: not in the checkpoint",
        "  half: has the shape (8,), in the checkpoint (7,)",
    ]
    del target["none"]
    load(reader, target, cast=True)
    assert torch.equal(target["weight"], reader.tensor("weight").double())


# In whatever pieces


def resharded(folder: str) -> None:
    """Saves on all ranks in random boxes, loads on all of them and alone in other random boxes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for seed in range(6):
        rng = random.Random(seed)
        shapes = [(), (0, 3), (17,), (9, 8), (4, 5, 6), (3, 4, 2, 5)]
        full = {f"t{s}": some(s, rng.choice(DTYPES), n) for n, s in enumerate(shapes)}

        def boxes(shape: torch.Size, ranks: int, rng: random.Random = rng) -> list[Any]:
            cuts = cut(shape, rng.choice([1, 2, 5, 12]), rng)
            owners = [rng.randrange(ranks) for _ in cuts]
            return [box for box, owner in zip(cuts, owners, strict=True) if owner == rank or ranks == 1]

        sharded = {name: boxed(t, boxes(t.shape, world_size)) for name, t in full.items()}
        shared = {f"shared{n}": some((n, 3), torch.float32, n) for n in range(4)}
        path = Path(folder, "c")
        save(path, {**sharded, **shared}, {}, {"seed": seed}, dist.group.WORLD)
        reader = open_checkpoint(path, dist.group.WORLD)
        assert set(reader.manifest.tensors) == {*full, *shared}
        assert reader.manifest.world_size == world_size
        reader.verify(sorted(reader.manifest.files)[rank::world_size])
        for group, ranks in ((dist.group.WORLD, world_size), (None, 1)):
            results = {name: torch.zeros_like(t) for name, t in {**full, **shared}.items()}
            mine = {name: boxes(t.shape, ranks) for name, t in full.items()}
            targets = {name: boxed(results[name], mine[name]) for name in full}
            load(reader, {**targets, **{name: results[name] for name in shared}}, group)
            for name, t in full.items():
                for box in mine[name]:
                    assert same_bits(part(results[name], box), part(t, box)), (seed, name, box)
            assert all(same_bits(results[name], t) for name, t in shared.items())
        for name, t in {**full, **shared}.items():
            assert same_bits(reader.tensor(name), t)
            again = torch.zeros_like(t)
            for offsets, piece in reader.pieces(name):
                part(again, (offsets, tuple(piece.shape))).copy_(piece)
            assert same_bits(again, t)
        dist.barrier()


@pytest.mark.parametrize("world_size", [2, 3])
def test_pieces_of_any_form_from_any_rank(world_size: int, tmp_path: Path) -> None:
    run_ranks(resharded, world_size, str(tmp_path))


def test_tensors_that_all_ranks_have_are_written_once(tmp_path: Path) -> None:
    assert run_ranks(written_once, 2, str(tmp_path / "c"))[0] == ["b", "a", "c"]
    assert sum(file.stat().st_size for file in files(tmp_path).values()) < 3 * 4000 + 3000


def written_once(path: str) -> list[str]:
    save(path, {name: torch.ones(1000) for name in "bac"}, {}, {}, dist.group.WORLD)
    return list(CheckpointReader(path).manifest.tensors)


def test_each_stored_piece_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = some((64, 64), torch.float32)
    save(tmp_path / "c", {"w": boxed(full, cut((64, 64), 9, random.Random(1)))}, {}, {})
    reader = CheckpointReader(tmp_path / "c")
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: read.append(preadv(fd, into, at)) or read[-1])
    target = torch.zeros(64, 64)
    load(reader, {"w": boxed(target, cut((64, 64), 30, random.Random(2)))})
    assert torch.equal(target.view(torch.int32), full.view(torch.int32))
    assert sum(read) == 64 * 64 * 4
    assert len(read) == 9


def test_one_process_beside_others_saves_alone(tmp_path: Path) -> None:
    run_ranks(alone, 2, str(tmp_path))


def alone(folder: str) -> None:
    path, tensors = Path(folder, str(dist.get_rank())), {"a": torch.full((3,), float(dist.get_rank()))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(path, tensors, {}, {})
        assert torch.equal(loaded(CheckpointReader(path))["a"], tensors["a"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_load_reads_it(tmp_path: Path) -> None:
    tensors = small(tmp_path)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp_load(targets, storage_reader=CheckpointReader(tmp_path))
    assert all(same_bits(targets[name], tensor) for name, tensor in tensors.items())


def test_a_thread_in_the_background_saves(tmp_path: Path) -> None:
    thread = threading.Thread(target=small, args=(tmp_path / "c",))
    thread.start()
    thread.join()
    CheckpointReader(tmp_path / "c").verify()


def peak_bytes(work: Callable[[], None]) -> int:
    """How much more memory than before the process had at the most; the least of three, as the system moves pages."""
    return min(_peak_bytes(work) for _ in range(3))


def _peak_bytes(work: Callable[[], None]) -> int:
    """In a child of its own."""
    torch.set_num_threads(1)  # threads of others are not there after a fork
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()  # what is only needed once is there
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _resident("VmRSS")
            work()
            os.write(write, str(_resident("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as file:
        return int(file.read())


def _resident(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def test_memory_is_that_of_one_piece(tmp_path: Path) -> None:
    mib, rows = 2**20, 24
    boxes = [((row, 0), (1, 2 * mib // 4)) for row in range(rows)]
    made = {"w": Boxed((rows, 2 * mib // 4), torch.float32, boxes, lambda box: torch.full(box[1], float(box[0][0])))}
    whole = {"w": torch.ones(rows, 2 * mib // 4)}
    # straight from the tensor's memory; each piece made, written and dropped; each piece read and copied
    assert peak_bytes(lambda: save(tmp_path / "whole", whole, {}, {})) < mib
    assert peak_bytes(lambda: save(tmp_path / "made", made, {}, {})) < 2 * 2 * mib
    reader = CheckpointReader(tmp_path / "made")
    assert peak_bytes(lambda: load(reader, whole)) < 2 * 2 * mib
    assert peak_bytes(reader.verify) < 2 * mib


# Damage is found, and named


def flipped(raw: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[position] ^= 1 << bit
    return bytes(changed)


def damage_found(path: Path) -> list[str]:
    """What a reader says that checks, and what one says that uses everything."""
    said = []
    for use in (lambda reader: reader.verify(), _use):
        try:
            use(CheckpointReader(path))
        except CorruptCheckpointError as error:
            said.append(str(error))
    return said


def _use(reader: CheckpointReader) -> None:
    loaded(reader)
    reader.attachment("trainer.pt")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    tensors = small(tmp_path)
    rng = random.Random(0)
    manifest = CheckpointReader(tmp_path).manifest
    ranges = {name: (p.start, p.end) for name, t in manifest.tensors.items() for p in t.pieces}
    assert set(ranges) == set(tensors)
    for name, file in files(tmp_path).items():
        raw = file.read_bytes()
        for position in range(len(raw)):
            file.write_bytes(flipped(raw, position, rng.randrange(8)))
            said = damage_found(tmp_path)
            assert len(said) == 2, f"byte {position} of {name}"
            assert all(name in text for text in said)
            if name == "rank0.safetensors":
                touched = [fqn for fqn, (start, end) in ranges.items() if start <= position < end]
                assert all(f"in the tensor {fqn!r}" in text for fqn in touched for text in said)
                assert touched or all("in its header" in text or "of the save" in text for text in said)
        file.write_bytes(raw)
    assert damage_found(tmp_path) == []


def test_verify_lists_everything_that_is_damaged_and_says_how_far_it_is(tmp_path: Path) -> None:
    small(tmp_path)
    reader = CheckpointReader(tmp_path)
    seen: list[int] = []
    reader.verify(progress=seen.append)
    assert sum(seen) == reader.manifest.nbytes
    for file in files(tmp_path).values():
        if file.name != "checkpoint.json":
            file.write_bytes(flipped(file.read_bytes(), file.stat().st_size - 1, 0))
    with pytest.raises(CorruptCheckpointError) as error:
        reader.verify()
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(CorruptCheckpointError, match=r"^.*trainer\.pt is damaged: its checksum is \w+, expected \w+"):
        reader.verify(["trainer.pt"])


@pytest.mark.parametrize("name", ["rank0.safetensors", "trainer.pt"])
def test_files_of_another_length_are_found(name: str, tmp_path: Path) -> None:
    small(tmp_path)
    file = files(tmp_path)[name]
    raw = file.read_bytes()
    for length in [0, 5, 50, len(raw) - 1]:
        file.write_bytes(raw[:length])
        with pytest.raises(CorruptCheckpointError, match=rf"{name} has {length} bytes, expected {len(raw)}: it was"):
            CheckpointReader(tmp_path)
    file.write_bytes(raw + b"\0")
    with pytest.raises(CorruptCheckpointError, match=rf"{name} has {len(raw) + 1} bytes, .* it was written to"):
        CheckpointReader(tmp_path)
    file.unlink()
    with pytest.raises(CorruptCheckpointError, match=rf"{name} is missing\. Use another checkpoint"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 30, 200])
def test_a_truncated_manifest_is_found(keep: int, tmp_path: Path) -> None:
    small(tmp_path)
    manifest = tmp_path / "checkpoint.json"
    manifest.write_bytes(manifest.read_bytes()[:keep])
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint\.json is damaged"):
        CheckpointReader(tmp_path)


def test_files_that_shrink_or_go_while_they_are_read(tmp_path: Path) -> None:
    small(tmp_path)
    reader = CheckpointReader(tmp_path)
    file = files(tmp_path)["rank0.safetensors"]
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(CorruptCheckpointError, match="is shorter than it was"):
        loaded(reader)
    file.write_bytes(raw)
    reader = CheckpointReader(tmp_path)
    small(tmp_path)
    with pytest.raises(CorruptCheckpointError, match="is missing: the checkpoint has been overwritten or removed"):
        loaded(reader)


def test_a_file_of_another_save_is_refused_by_the_names_of_both(tmp_path: Path) -> None:
    small(tmp_path / "a")
    small(tmp_path / "b")
    theirs, ours = (CheckpointReader(tmp_path / name).manifest.save_id for name in ("a", "b"))
    shutil.copy(files(tmp_path / "a")["rank0.safetensors"], files(tmp_path / "b")["rank0.safetensors"])
    with pytest.raises(CorruptCheckpointError) as error:
        CheckpointReader(tmp_path / "b")
    assert f"rank0.safetensors is of the save {theirs}, and the checkpoint of the save {ours}" in str(error.value)


def test_ranks_that_find_different_checkpoints(tmp_path: Path) -> None:
    for name in ("0", "1"):
        small(tmp_path / name)
    first, second = run_ranks(different_checkpoints, 2, str(tmp_path))
    assert first == second
    assert all("the ranks read different checkpoints at" in said for said in first)


def different_checkpoints(folder: str) -> list[str]:
    path = Path(folder, str(dist.get_rank()))
    said = []
    for attempt in (
        lambda: open_checkpoint(path, dist.group.WORLD),
        lambda: loaded(CheckpointReader(path), dist.group.WORLD),
    ):
        try:
            attempt()
        except CheckpointError as error:
            said.append(str(error).replace(str(path), "PATH").replace(str(Path(folder, "0")), "PATH"))
    return said


def test_all_ranks_hear_of_damage_that_one_of_them_finds(tmp_path: Path) -> None:
    results = run_ranks(damaged_for_one, 2, str(tmp_path / "c"))
    assert results[0] == results[1]
    assert "rank1.safetensors is damaged in the tensor 'w'" in results[0][0]
    assert "rank1.safetensors is damaged in its header" in results[0][1]
    assert "does not fit:\n  w: has the shape (5, 4), in the checkpoint (4, 4)" in results[0][2]


def damaged_for_one(folder: str) -> list[str]:
    path, rank, group = Path(folder), dist.get_rank(), dist.group.WORLD
    rows = [[((row, 0), (1, 4)) for row in range(rank * 2, rank * 2 + 2)]]
    save(path, {"w": boxed(torch.ones(4, 4), rows[0])}, {}, {}, group)
    said = []

    def attempt(work: Callable[[], None]) -> None:
        try:
            work()
        except CheckpointError as error:
            said.append(f"{type(error).__name__}: {error}")
        dist.barrier()

    def flip(position: int) -> None:
        if rank == 0:
            file = files(path)["rank1.safetensors"]
            file.write_bytes(flipped(file.read_bytes(), position, 3))
        dist.barrier()

    reader = open_checkpoint(path, group)
    flip(-1)
    attempt(lambda: load(reader, {"w": boxed(torch.zeros(4, 4), rows[0])}, group))
    flip(-1)
    flip(20)
    attempt(lambda: open_checkpoint(path, group))
    flip(20)
    shape = (5, 4) if rank == 1 else (4, 4)
    attempt(lambda: load(reader, {"w": boxed(torch.zeros(shape), rows[0])}, group))
    return said


# What is not ours, or not for us


def rewritten(path: Path, **changes: Any) -> None:
    """Changes fields of a manifest, with a checksum that is right."""
    fields = json.loads((path / "checkpoint.json").read_text())
    del fields["checksum"]
    text = json.dumps({**fields, **changes}, sort_keys=True, separators=(",", ":"))
    checksum = xxhash.xxh3_64_hexdigest(text.encode())
    (path / "checkpoint.json").write_text(f'{{"checksum":"{checksum}",{text[1:]}')


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    small(tmp_path)
    rewritten(tmp_path, version=2, novel="thing")
    with pytest.raises(IncompatibleCheckpointError, match=r"has version 2 .* reads version 1\. Update light"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"save_id": "../elsewhere"},
        {"files": {"../../secret": {"nbytes": 0, "xxh3": "0"}}},
        {"files": {}},
        {"files": []},
        {"tensors": {"a": {"dtype": "float32", "shape": [2], "pieces": []}}},
        {"tensors": {"a": {"dtype": "load", "shape": [], "pieces": []}}},
        {"tensors": {}},
    ],
    ids=str,
)
def test_a_forged_manifest_leads_nowhere(change: dict[str, Any], tmp_path: Path) -> None:
    small(tmp_path)
    rewritten(tmp_path, **change)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint\.json is not formed as expected"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "start", "nbytes"), [([1, 0], 0, 0), ([-1, 0], 0, 0), ([0], 0, 0), ([0, 0], 4, 0), ([0, 0], 0, 4)]
)
def test_a_forged_piece_leads_nowhere(offsets: list[int], start: int, nbytes: int, tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(2, 2)}, {}, {})
    tensors = json.loads((tmp_path / "checkpoint.json").read_text())["tensors"]
    piece = tensors["a"]["pieces"][0]
    piece["offsets"] = offsets
    piece["start"] += start
    piece["nbytes"] += nbytes
    rewritten(tmp_path, tensors=tensors)
    with pytest.raises(CorruptCheckpointError, match="is not formed as expected"):
        CheckpointReader(tmp_path)


FOREIGN = {
    "nothing there": (None, "there is nothing at"),
    "empty": ([], "is an empty folder"),
    "DeepSpeed": (["zero_to_fp32.py", "latest", "global_step5/x.pt"], "a checkpoint of DeepSpeed"),
    "a broken save": (["20260101T000000000000-0123abcd/rank0.safetensors"], "whose save, or removal, was not finished"),
    "a lock": ([".lock"], "whose save, or removal, was not finished"),
    "something else": (["notes.txt", "b", "a"], "a, b, notes.txt"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_a_checkpoint_is_described(kind: str, tmp_path: Path) -> None:
    names, expected = FOREIGN[kind]
    path = tmp_path / "c"
    for name in names or []:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    if names == []:
        path.mkdir()
    with pytest.raises(NotACheckpointError) as error:
        CheckpointReader(path)
    assert str(path) in str(error.value)
    assert expected in str(error.value)
    if kind not in ("a broken save", "a lock"):
        with pytest.raises(NotACheckpointError, match="Nothing has been removed"):
            remove(path)
        assert all((path / name).exists() for name in names or [])


def test_a_path_that_is_a_file_or_the_folder_of_a_save(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    file.write_text("x")
    with pytest.raises(NotACheckpointError, match=f"{file} is no checkpoint: a file that begins with b'x'"):
        CheckpointReader(file)
    expected = f"expected a folder for a sharded checkpoint, {file} is a file"
    with pytest.raises(CheckpointWriteError, match=expected) as error:
        small(file)
    assert isinstance(error.value.__cause__, NotADirectoryError)
    with pytest.raises(CheckpointWriteError, match="Not a directory"):
        small(file / "below")
    with pytest.raises(NotACheckpointError, match="is no checkpoint"):
        remove(file)
    assert file.read_text() == "x"
    small(tmp_path / "c")
    (inside,) = (entry for entry in (tmp_path / "c").iterdir() if entry.is_dir())
    with pytest.raises(NotACheckpointError, match="Give its folder"):
        CheckpointReader(inside)


def test_another_programs_manifest_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text('{"their": "file"}')
    for attempt in (small, CheckpointReader, remove):
        with pytest.raises(CheckpointError, match="was not written by this package"):
            attempt(tmp_path)
    assert (tmp_path / "checkpoint.json").read_text() == '{"their": "file"}'
    assert os.listdir(tmp_path) == ["checkpoint.json"]


@pytest.mark.parametrize("damage", ["flipped", "newer"])
def test_a_manifest_that_does_not_load_is_overwritten(damage: str, tmp_path: Path) -> None:
    small(tmp_path)
    if damage == "newer":
        rewritten(tmp_path, version=2)
    else:
        (tmp_path / "checkpoint.json").write_text("{")
    tensors = small(tmp_path)
    assert same_bits(loaded(CheckpointReader(tmp_path))["weight"], tensors["weight"])
    assert len(os.listdir(tmp_path)) == 2


def test_no_save_through_a_link(tmp_path: Path) -> None:
    small(tmp_path / "best")
    (tmp_path / "last").symlink_to("best")
    CheckpointReader(tmp_path / "last").verify()
    with pytest.raises(CheckpointWriteError, match="would overwrite the checkpoint that it points to"):
        small(tmp_path / "last")
    remove(tmp_path / "last")
    assert os.listdir(tmp_path) == ["best"]
    CheckpointReader(tmp_path / "best").verify()


def as_nobody(work: Callable[[], None]) -> None:
    """Runs ``work`` in a process whose permissions count; root has all."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setuid(65534)
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter, below one that they may, too."""
    path = Path("/tmp", f"gemini-{os.getpid()}-{random.random()}")
    path.mkdir(mode=0o755)
    yield path
    for folder in path.rglob("*"):
        folder.chmod(0o755)
    shutil.rmtree(path)


def test_no_permission(public: Path) -> None:
    small(public / "c")
    (public / "closed").mkdir()
    small(public / "closed" / "c")
    for entry in (public / "c", public, public / "closed"):
        entry.chmod(0o555 if entry.name != "closed" else 0o000)

    def attempts() -> None:
        for path in (public / "c", public / "new", public / "closed" / "c"):
            with pytest.raises(CheckpointWriteError, match=r"saved: \[Errno 13\] Permission denied.*changed"):
                small(path)
        with pytest.raises(CheckpointError, match=r"could not be read: \[Errno 13\] Permission denied"):
            CheckpointReader(public / "closed" / "c")
        with pytest.raises(CheckpointError, match=r"could not be removed: \[Errno 13\] Permission denied"):
            remove(public / "c")
        CheckpointReader(public / "c").verify()

    as_nobody(attempts)


# What cannot be saved


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (({"a": 3}, {}, {}), "'a' is not a tensor"),
        (({"a": torch.eye(3).to_sparse()}, {}, {}), "'a' has the layout torch.sparse_coo"),
        (({"a": torch.empty(3, device="meta")}, {}, {}), "NotImplementedError: Cannot copy out of meta tensor"),
        (({}, {"../trainer.pt": b""}, {}), "an attachment cannot be called '../trainer.pt'"),
        (({}, {"rank0.safetensors": b""}, {}), "an attachment cannot be called 'rank0.safetensors'"),
        (({}, {}, {"a": {1, 2}}), "has to be JSON: Object of type set"),
        (({"a": boxed(torch.ones(4, 2), [((0, 0), (3, 2))])}, {}, {}), "pieces of 'a' do not fill its shape"),
        (
            ({"a": Boxed((4,), torch.float32, [((0,), (4,))], lambda _: torch.ones(3))}, {}, {}),
            r"expected a piece of shape \(4,\) and torch.float32, got \(3,\)",
        ),
    ],
    ids=["int", "sparse", "meta", "path", "reserved", "set", "hole", "shape"],
)
def test_what_cannot_be_saved_is_refused(arguments: Any, expected: str, tmp_path: Path) -> None:
    tensors = small(tmp_path / "c")
    with pytest.raises(CheckpointWriteError, match=expected):
        save(tmp_path / "c", *arguments)
    assert same_bits(loaded(CheckpointReader(tmp_path / "c"))["weight"], tensors["weight"])
    assert len(os.listdir(tmp_path / "c")) == 2


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raises_on_one_rank(path: str) -> str:
    def get(box: Any) -> Tensor:
        if dist.get_rank() == 1:
            raise UnpicklableError(1, 2)
        return torch.ones(box[1])

    tensors = {"a": Boxed((2, 3), torch.float32, [((dist.get_rank(), 0), (1, 3))], get)}
    with pytest.raises(CheckpointWriteError) as error:
        save(path, tensors, {}, {}, dist.group.WORLD)
    return str(error.value)


def test_an_error_that_does_not_pickle_reaches_the_other_ranks(tmp_path: Path) -> None:
    said = run_ranks(raises_on_one_rank, 2, str(tmp_path / "c"))
    assert said[0] == said[1]
    assert "rank 1: RuntimeError: UnpicklableError: 1 and 2. There is no checkpoint." in said[0]
    assert not (tmp_path / "c").exists()


# Removal


def test_removal(tmp_path: Path) -> None:
    small(tmp_path / "c")
    remove(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    small(tmp_path / "c")
    (tmp_path / "c" / "notes.txt").write_text("mine")
    (tmp_path / "c" / "20200101T000000000000-0123abcd").mkdir()
    (tmp_path / "c" / "checkpoint.json").write_text("{")
    remove(tmp_path / "c")
    assert os.listdir(tmp_path / "c") == ["notes.txt"]


# Elsewhere


@pytest.fixture
def url() -> Iterator[str]:
    import fsspec

    yield "memory://bucket/run/c"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def test_a_remote_path(url: str) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for epoch in range(2):
        tensors = small(url, epoch=epoch)
        reader = CheckpointReader(url)
        assert reader.manifest.about["epoch"] == epoch
        assert all(same_bits(t, tensors[name]) for name, t in loaded(reader).items())
        assert all(same_bits(reader.tensor(name), t) for name, t in tensors.items())
        assert reader.attachment("trainer.pt") == bytes(range(100))
        reader.verify()
        assert len(store.ls("/bucket/run/c")) == 2
    name = f"/bucket/run/c/{reader.manifest.save_id}/rank0.safetensors"
    store.pipe_file(name, flipped(store.cat_file(name), -1, 0))
    with pytest.raises(CorruptCheckpointError, match=rf"{url}/.*/rank0\.safetensors is damaged in the tensor 'half'"):
        loaded(CheckpointReader(url))
    remove(url)
    assert not store.exists("/bucket/run/c")
    with pytest.raises(NotACheckpointError, match=f"there is nothing at {url}"):
        CheckpointReader(url)


@pytest.mark.parametrize("failing", ["pipe_file", "_open", "makedirs"])
def test_a_remote_save_that_fails(failing: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    tensors = small(url)
    before = set(MemoryFileSystem.store)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(5, "the bucket is gone")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, failing, fail)
        with pytest.raises(CheckpointWriteError, match="the bucket is gone"):
            save(url, {"a": torch.ones(2)}, {}, {})
    assert all(same_bits(t, tensors[name]) for name, t in loaded(CheckpointReader(url)).items())
    assert set(MemoryFileSystem.store) == before


def test_a_local_url_and_an_unknown_one(tmp_path: Path) -> None:
    small(f"file://{tmp_path}/c")
    CheckpointReader(tmp_path / "c").verify()
    with pytest.raises(CheckpointError, match="cannot be reached through fsspec: Protocol not known: nowhere"):
        small("nowhere://c")
