"""What lies at a path, what to do with it if it is no checkpoint, and which checkpoint of a folder is the newest."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import lightning_gemini
from lightning_gemini.checkpoint import CheckpointReader, save
from lightning_gemini.checkpoint.full_file import write_full
from lightning_gemini.checkpoint.io import GeminiCheckpointIO
from lightning_gemini.checkpoint.kinds import Kind, recognise
from lightning_gemini.checkpoint.newest import newest_checkpoint, verify
from lightning_gemini.core.errors import (
    CheckpointError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    NotACheckpointError,
)
from lightning_gemini.resumption import Resumption


def write(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def full(path: Path | str, step: int = 1) -> None:
    write_full({"pytorch-lightning_version": "2.6", "global_step": step, "state_dict": {"w": torch.ones(99)}}, path)


def sharded(path: Path | str, step: int = 1) -> None:
    save(path, {"state_dict.w": torch.full((99,), float(step))}, {"trainer.pt": b"rest"}, {"global_step": step})


def said(path: Path | str, error: type[CheckpointError] = NotACheckpointError) -> str:
    with pytest.raises(error) as caught:
        recognise(path)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_folder(path: Path) -> Path:
    (found,) = (entry for entry in path.iterdir() if entry.is_dir())
    return found


# What lies there


@pytest.fixture(params=["local", "file", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return "memory://kinds"
    return str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


def test_checkpoints_and_their_parts(base: str) -> None:
    full(f"{base}/deep/full.ckpt")
    sharded(f"{base}/deep/sharded.ckpt")
    assert recognise(f"{base}/deep/full.ckpt") is Kind.FULL
    assert recognise(f"{base}/deep/sharded.ckpt") is Kind.SHARDED
    assert recognise(f"{base}/deep/sharded.ckpt/") is Kind.SHARDED
    give = f"Give its folder, {base}/deep/sharded.ckpt."
    assert give in said(f"{base}/deep/sharded.ckpt/checkpoint.json")
    part = f"{base}/deep/sharded.ckpt/{CheckpointReader(f'{base}/deep/sharded.ckpt').manifest.save_id}"
    assert give in said(part)
    assert give in said(f"{part}/rank0.safetensors")
    assert said(base) == (
        f"{base} is no checkpoint itself, but holds some: {base}/deep/full.ckpt, {base}/deep/sharded.ckpt. Give one of "
        "them; lightning_gemini.newest_checkpoint finds the newest."
    )
    assert said(f"{base}/deep/none.ckpt") == (
        f"there is nothing at {base}/deep/none.ckpt. The folder it would be in holds full.ckpt, sharded.ckpt/."
    )
    assert "not even the folder" in said(f"{base}/none/none.ckpt")


FOREIGN = {
    "deepspeed of lightning": (
        ["latest", "zero_to_fp32.py", "checkpoint/mp_rank_00_model_states.pt"],
        r"is a checkpoint of DeepSpeed: it holds checkpoint/, latest, zero_to_fp32.py. Convert .*"
        r"lightning\.pytorch\.utilities\.deepspeed\.convert_zero_checkpoint_to_fp32_state_dict\('.*/x y'",
    ),
    "deepspeed": (["latest", "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "is a checkpoint of DeepSpeed"),
    "the inside of deepspeed": (["mp_rank_00_model_states.pt", "zero_pp_rank_0_x.pt"], "is a checkpoint of DeepSpeed"),
    "fsdp": (
        [".metadata", "meta.pt", "__0_0.distcp"],
        r"FSDP or ModelParallel strategy: it holds \.metadata, __0_0\.distcp, meta\.pt\. Convert it with "
        r"python -m lightning\.pytorch\.utilities\.consolidate_checkpoint '.*/x y'\.$",
    ),
    "dcp": (
        [".metadata", "__0_0.distcp"],
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch '.*/x y' out.pt",
    ),
    "hugging face": (
        ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        "is a Hugging Face model: .* lightning_gemini.from_pretrained",
    ),
    "hugging face, old": (["config.json", "pytorch_model.bin"], "is a Hugging Face model"),
    "peft": (["adapter_config.json", "adapter_model.safetensors"], "is an adapter of peft"),
    "something": (["notes.txt", "more/notes.txt"], "no checkpoint: it has no checkpoint.json, but more/, notes.txt"),
    "much": ([f"{number:02}.txt" for number in range(12)], "00.txt, .* 07.txt and 4 more"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_folders_of_others(kind: str, tmp_path: Path) -> None:
    names, expected = FOREIGN[kind]
    for name in names:
        write(tmp_path / "x y" / name)
    with pytest.raises(NotACheckpointError, match=expected):
        recognise(tmp_path / "x y")


def test_the_tools_that_are_named_exist() -> None:
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    assert callable(convert_zero_checkpoint_to_fp32_state_dict)
    for module in ("lightning.pytorch.utilities.consolidate_checkpoint", "torch.distributed.checkpoint.format_utils"):
        assert find_spec(module) is not None


def test_files_of_others(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    write(tmp_path / "weights", len(header).to_bytes(8, "little") + header + b"x")
    assert "is a safetensors file: weights alone" in said(tmp_path / "weights")
    write(tmp_path / "text.ckpt", b"hello")
    assert said(tmp_path / "text.ckpt").endswith("is no checkpoint: a file that begins with b'hello'.")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as script:
        script.writestr("script/data.pkl", "")
        script.writestr("script/constants.pkl", "")
    assert "is a TorchScript archive" in said(tmp_path / "script.pt")
    shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path, "text.ckpt")
    assert "is a zip archive, but not one of torch.save" in said(tmp_path / "archive.zip")
    write(tmp_path / "empty.ckpt", b"")
    assert "is an empty file" in said(tmp_path / "empty.ckpt", CorruptCheckpointError)
    (tmp_path / "folder").mkdir()
    assert "is an empty folder" in said(tmp_path / "folder")
    (tmp_path / "link.ckpt").symlink_to("gone.ckpt")
    assert said(tmp_path / "link.ckpt").endswith("link.ckpt is a link to gone.ckpt, where there is nothing.")
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a folder nor a file" in said(tmp_path / "pipe")
    # a damaged checkpoint is one: reading it says what is wrong
    full(tmp_path / "cut.ckpt")
    write(tmp_path / "cut.ckpt", (tmp_path / "cut.ckpt").read_bytes()[:300])
    assert recognise(tmp_path / "cut.ckpt") is Kind.FULL
    torch.save({}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert recognise(tmp_path / "old.ckpt") is Kind.FULL


def test_paths_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Protocol not known: nosuch" in said("nosuch://bucket/c.ckpt", CheckpointError)

    def refuse(*_: object, **__: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.ls", refuse)  # tests may run as root
    assert said(tmp_path, CheckpointError) == f"{tmp_path} cannot be read: Permission denied."


def test_a_save_that_was_not_finished(tmp_path: Path) -> None:
    sharded(tmp_path / "c.ckpt")
    (tmp_path / "c.ckpt" / "checkpoint.json").unlink()
    assert "whose save, or removal, was not finished: it has no checkpoint.json" in said(tmp_path / "c.ckpt")
    write(tmp_path / "begun.ckpt" / ".lock")
    assert "was not finished" in said(tmp_path / "begun.ckpt")


def test_a_checkpoint_of_a_newer_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr("lightning_gemini.checkpoint.manifest.VERSION", 2)
        sharded(tmp_path / "c.ckpt")
    assert recognise(tmp_path / "c.ckpt") is Kind.SHARDED
    with pytest.raises(IncompatibleCheckpointError, match="version 2"):
        verify(tmp_path / "c.ckpt")


# The newest one


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def at(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


def test_the_newest_of_both_kinds_at_any_depth(tmp_path: Path) -> None:
    assert lightning_gemini.newest_checkpoint is newest_checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(tmp_path / "none") is None
        assert newest_checkpoint(tmp_path) is None
        run = tmp_path / "version_0" / "checkpoints"
        full(run / "step=9.ckpt", 9)
        at(run / "step=9.ckpt", 1e9)
        full(run / "step=10.ckpt", 10)
        at(run / "step=10.ckpt", 2e9)
        write(run / "other.pt")
        write(run / ".step=11.ckpt.0123abcd.partial")
        assert newest_checkpoint(tmp_path) == str(run / "step=10.ckpt")
        at(run / "step=10.ckpt", 9e8)
        assert newest_checkpoint(str(tmp_path)) == str(run / "step=9.ckpt")
        sharded(tmp_path / "version_1" / "step=3", 3)  # the time of a sharded one is in it
        assert newest_checkpoint(tmp_path) == str(tmp_path / "version_1" / "step=3")
        shutil.copytree(tmp_path / "version_1" / "step=3", tmp_path / "a copy")
        sharded(tmp_path / "version_1" / "step=2", 2)
        at(tmp_path / "version_1" / "step=2" / "checkpoint.json", 1)
        assert newest_checkpoint(tmp_path) == str(tmp_path / "version_1" / "step=2")


def test_broken_newer_ones_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        sharded(tmp_path / f"step={step}.ckpt", step)
    damage(save_folder(tmp_path / "step=3.ckpt") / "rank0.safetensors")
    full(tmp_path / "step=4.ckpt", 4)
    damage(tmp_path / "step=4.ckpt")
    at(tmp_path / "step=4.ckpt", 4e9)
    (tmp_path / "last.ckpt").symlink_to("step=4.ckpt")
    (tmp_path / "gone.ckpt").symlink_to("step=5.ckpt")
    with pytest.warns(UserWarning, match=r"step=2\.ckpt is the newest checkpoint that is whole") as caught:
        assert newest_checkpoint(tmp_path) == str(tmp_path / "step=2.ckpt")
    text = str(caught[0].message)
    assert text.count("step=4.ckpt is damaged") == 1
    assert "(state_dict.w)" in text
    assert "step=3.ckpt" in text
    assert "'state_dict.w'" in text
    assert "step=1.ckpt" not in text, "older ones are of no concern"
    assert caught[0].filename == __file__
    for step in (1, 2):
        (tmp_path / f"step={step}.ckpt" / "checkpoint.json").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match="but none that is whole") as failed:
        newest_checkpoint(tmp_path)
    assert all(f"step={step}.ckpt" in str(failed.value) for step in (1, 2, 3, 4))


def test_a_link_leads_to_its_checkpoint(tmp_path: Path) -> None:
    sharded(tmp_path / "runs" / "step=1.ckpt")
    (tmp_path / "runs" / "last.ckpt").symlink_to("step=1.ckpt")
    (tmp_path / "runs" / "loop").symlink_to(".")
    for number in range(2500):
        write(tmp_path / "data" / f"{number}.txt")
    checked: list[str] = []
    assert newest_checkpoint(tmp_path, checked.append) == str(tmp_path / "runs" / "step=1.ckpt")
    assert len(checked) == 1


def test_a_first_save_that_was_killed_loses_nothing(tmp_path: Path) -> None:
    sharded(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / "checkpoint.json").unlink()
    with pytest.warns(UserWarning, match="there is no checkpoint in .* yet:\n.*a.ckpt is a sharded checkpoint whose"):
        assert newest_checkpoint(tmp_path) is None
    full(tmp_path / "b.ckpt")
    at(tmp_path / "b.ckpt", 1e9)
    with pytest.warns(UserWarning, match="newer ones are broken"):
        assert newest_checkpoint(tmp_path) == str(tmp_path / "b.ckpt")


def test_other_file_systems_and_what_is_no_folder(tmp_path: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    full("memory://run/checkpoints/a.ckpt")
    found = newest_checkpoint("memory://run")
    assert found is not None
    assert recognise(found) is Kind.FULL
    full(tmp_path / "a.ckpt")
    with pytest.raises(NotACheckpointError, match="is a file, expected the folder of a run"):
        newest_checkpoint(tmp_path / "a.ckpt")


def test_ranks_share_a_verification(tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    save(path, {f"state_dict.{i}": torch.ones(50) for i in range(3)}, {"a": b"x" * 40, "b": b"y" * 70}, {})
    parts: list[list[int]] = [[], []]
    for rank in range(2):
        assert verify(path, (rank, 2), parts[rank].append) is Kind.SHARDED
    alone: list[int] = []
    verify(path, progress=alone.append)
    assert sum(map(sum, parts)) == sum(alone) == CheckpointReader(path).manifest.nbytes
    assert all(map(sum, parts))


# Lightning's plugin


def test_removal_takes_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    io = GeminiCheckpointIO()
    full(tmp_path / "full.ckpt")
    sharded(tmp_path / "sharded.ckpt")
    (tmp_path / "link").symlink_to("sharded.ckpt")
    (tmp_path / "dangling").symlink_to("nowhere")
    write(tmp_path / "other" / "precious.txt")
    for name in ("link", "dangling", "nothing"):
        io.remove_checkpoint(tmp_path / name)
    assert recognise(tmp_path / "sharded.ckpt") is Kind.SHARDED
    with pytest.raises(NotACheckpointError, match="other"):
        io.remove_checkpoint(tmp_path / "other")
    io.remove_checkpoint(str(tmp_path / "sharded.ckpt"))
    io.remove_checkpoint(tmp_path / "full.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    for make in (full, sharded):
        make("memory://removal/c.ckpt")
        io.remove_checkpoint("memory://removal/c.ckpt")
        assert fsspec.filesystem("memory").find("/removal") == []


def test_what_the_plugin_refuses(tmp_path: Path) -> None:
    io = GeminiCheckpointIO()
    path = tmp_path / "c.ckpt"
    with pytest.raises(ConfigurationError, match="storage_options"):
        io.save_checkpoint({}, path, storage_options={})
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(
        NotACheckpointError, match=r"not of a Trainer: it has the keys 'weight', 'bias'\. .*load_state_"
    ):
        Resumption("exact").load(path, io, None)
    assert io.load_checkpoint(path).keys() == {"weight", "bias"}, "launchers hand weights over in such files"
    with pytest.raises(NotACheckpointError, match="there is nothing at"):
        io.load_checkpoint(tmp_path / "none.ckpt")
    full(path, 8)
    assert io.load_checkpoint(path)["global_step"] == 8
    assert io.load_checkpoint(path, map_location=lambda storage, location: storage)["global_step"] == 8
