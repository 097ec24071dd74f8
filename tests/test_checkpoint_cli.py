"""`lightning-gemini verify` and `consolidate`, and checkpoints that go from one strategy to another."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_gemini import GeminiStrategy, cli
from lightning_gemini.checkpoint import CheckpointReader, save
from lightning_gemini.checkpoint.consolidate import consolidate
from lightning_gemini.checkpoint.full_file import read_full, verify_full, write_full
from lightning_gemini.checkpoint.streamed import stand_in, write_streamed
from lightning_gemini.checkpoint.whole import whole_checkpoint
from lightning_gemini.core.errors import CheckpointWriteError
from tests.faults import Failing, installed
from tests.forked import in_child
from tests.lightning_cases import Module, loader, on_ranks, trainer
from tests.ranks import run_ranks

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

Run = Callable[..., str]
NAME = "MlpInGroups"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process and returns what it printed."""

    def run(*arguments: object) -> str:
        cli.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert err == "", "a progress bar is for terminals"
        return out

    return run


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command, which must fail, and returns its one line on stderr."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main([*map(str, arguments)])
        assert isinstance(stop.value.code, str)  # the interpreter prints it, and exits with 1
        assert "\n" not in stop.value.code
        assert capsys.readouterr() == ("", "")
        return stop.value.code

    return run


def fit(strategy: Any, folder: Path | None, epochs: int, resume: Path | None = None, **settings: Any) -> Module:
    module = Module(NAME)
    saver = [ModelCheckpoint(folder, save_last=True)] if folder else []
    run = trainer(strategy, max_epochs=epochs, callbacks=saver, enable_checkpointing=bool(folder), **settings)
    run.fit(module, loader(NAME), ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``sharded/last.ckpt`` and what plain Lightning saves at the same point, ``plain/last.ckpt``."""
    folder = tmp_path_factory.mktemp("saved")
    fit(GeminiStrategy(), folder / "sharded", 1)
    fit("auto", folder / "plain", 1)
    return folder


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype if isinstance(b, Tensor) else a == b for a, b in pairs)


# verify


def test_verify_says_what_is_in_a_sharded_checkpoint(run: Run, saved: Path) -> None:
    path = saved / "sharded" / "last.ckpt"
    weights = sum(p.numel() for p in Module(NAME).parameters())
    lines = run("verify", path).splitlines()
    assert lines[0] == f"{path}: every byte is as it was written"
    assert lines[1].startswith("sharded checkpoint, written by 1 rank(s) in 2 files of ")
    assert lines[2].startswith("saved: 20")
    assert lines[3] == "step 6, epoch 0"
    assert lines[4].startswith("precision: ")
    assert lines[5].startswith(f"weights: {len(Module(NAME).state_dict())} tensors of ")
    assert lines[5].endswith(f" ({weights:,} x float32)")
    assert lines[6].startswith("optimizer 0: AdamW, 2 group(s), ")
    assert lines[6].endswith(f" ({2 * weights:,} x float32)")
    assert lines[7].startswith("the rest: trainer.pt ")


def test_verify_says_what_is_in_a_file(run: Run, saved: Path) -> None:
    path = saved / "plain" / "last.ckpt"
    weights = sum(p.numel() for p in Module(NAME).parameters())
    lines = run("verify", path).splitlines()
    assert lines[0] == f"{path}: all that is in it is as it was written"
    assert lines[1].startswith("checkpoint in one file of ")
    assert lines[2].endswith(f"UTC, Lightning {L.__version__}")
    assert lines[3] == "step 6, epoch 0"
    assert lines[4].endswith(f" ({weights:,} x float32)")
    assert lines[5].startswith("optimizer 0: 2 group(s), ")


def test_verify_counts_tied_weights_once_and_loads_no_classes(run: Run, tmp_path: Path) -> None:
    weight = torch.ones(10, 10)
    write_full({"state_dict": {"a": weight, "b": weight}, "step": Path("x")}, tmp_path / "c.ckpt")
    assert "what it consists of cannot be told" in run("verify", tmp_path / "c.ckpt")
    write_full({"state_dict": {"a": weight, "b": weight}}, tmp_path / "c.ckpt")
    assert "weights: 1 tensors of 400 B (100 x float32)" in run("verify", tmp_path / "c.ckpt")
    torch.save({}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match="may go unnoticed"):
        assert "there are no checksums in it to compare" in run("verify", tmp_path / "old.ckpt")


def test_verify_fails_with_one_line(error: Run, tmp_path: Path) -> None:
    save(tmp_path / "c.ckpt", {"state_dict.a": torch.ones(500), "state_dict.b": torch.ones(500)}, {}, {})
    (tensors,) = (tmp_path / "c.ckpt").glob("*/rank0.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1  # in the one
    content[-2005] ^= 1  # and in the other
    tensors.write_bytes(content)
    line = error("verify", tmp_path / "c.ckpt")
    assert line.startswith("lightning-gemini verify: ")
    assert "'state_dict.a'" in line
    assert "'state_dict.b'" in line
    write_full({"state_dict": {"w": torch.ones(500)}}, tmp_path / "full.ckpt")
    damaged(tmp_path / "full.ckpt")
    assert "(state_dict.w)" in error("verify", tmp_path / "full.ckpt")
    assert "there is nothing at" in error("verify", tmp_path / "none")


def test_the_process_fails_with_code_1_and_help_is_light(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_gemini.cli", "verify", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"lightning-gemini verify: {tmp_path} is an empty folder.\n"
    script = f"""
import runpy, sys
for command in ("verify", "consolidate"):
    try:
        runpy.run_path({cli.__file__!r})["main"]([command, "--help"])
    except SystemExit:
        pass
print(*sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "usage: lightning-gemini verify [-h] CHECKPOINT" in out
    assert "usage: lightning-gemini consolidate [-h] [--no-weights-only] DIR OUT.ckpt" in out
    assert not {"torch", "lightning", "rich"} & set(out.splitlines()[-1].split())


def test_the_help_of_the_whole_command_mentions_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-gemini"])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "verify CHECKPOINT" in out
    assert "consolidate DIR OUT.ckpt" in out


# consolidate


def test_what_is_consolidated_is_what_plain_lightning_saves(run: Run, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.ckpt"
    printed = run("consolidate", saved / "sharded" / "last.ckpt", out)
    assert printed.startswith(f"{out}: one file of ")
    ours, theirs = read_full(out), read_full(saved / "plain" / "last.ckpt")
    assert ours.keys() - theirs.keys() == {"lightning_gemini"}
    assert theirs.keys() <= ours.keys()
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "loops"):
        assert same(ours[key], theirs[key]), key
    numbers = [group["params"] for group in ours["optimizer_states"][0]["param_groups"]]
    assert len(numbers) == 2
    assert [*numbers[0], *numbers[1]] == list(range(len(list(Module(NAME).parameters()))))
    assert os.listdir(out.parent) == ["out.ckpt"]


def test_plain_lightning_loads_it_and_goes_on_training(saved: Path, tmp_path: Path) -> None:
    consolidate(CheckpointReader(saved / "sharded" / "last.ckpt"), tmp_path / "out.ckpt")
    straight = fit("auto", None, 2)
    resumed = fit("auto", None, 2, tmp_path / "out.ckpt")
    assert resumed.losses == straight.losses[6:]
    assert same(dict(resumed.named_parameters()), dict(straight.named_parameters()))
    loaded = Module.load_from_checkpoint(tmp_path / "out.ckpt", name=NAME)
    assert same(loaded.state_dict(), read_full(tmp_path / "out.ckpt")["state_dict"])
    ours = fit(GeminiStrategy("host"), None, 2, tmp_path / "out.ckpt")
    assert ours.losses == straight.losses[6:]


def test_a_damaged_checkpoint_is_not_consolidated(error: Run, saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "c.ckpt", {"state_dict.w": torch.ones(500)}, {"trainer.pt": rest({"w": "state_dict.w"})}, ABOUT)
    (tensors,) = (tmp_path / "c.ckpt").glob("*/rank0.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)
    write_full({"global_step": 1}, tmp_path / "out.ckpt")
    line = error("consolidate", tmp_path / "c.ckpt", tmp_path / "out.ckpt")
    assert line.startswith("lightning-gemini consolidate: ")
    assert "damaged in the tensor 'state_dict.w'" in line
    assert read_full(tmp_path / "out.ckpt") == {"global_step": 1}
    assert sorted(os.listdir(tmp_path)) == ["c.ckpt", "out.ckpt"]
    whole = saved / "plain" / "last.ckpt"
    assert "is one ordinary file already" in error("consolidate", whole, tmp_path / "out.ckpt")
    sharded = saved / "sharded" / "last.ckpt"
    assert "is a folder, and this is to be a file" in error("consolidate", sharded, tmp_path)


ABOUT = {"fingerprint": {"optimizers": []}}


def rest(names: dict[str, str], **more: Any) -> bytes:
    """The file beside the tensors, of a checkpoint with these weights."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {key: {"lightning_gemini.tensor": name} for key, name in names.items()}, **more}, buffer)
    return buffer.getvalue()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    names = {f"w{number}": f"state_dict.w{number}" for number in range(3)}
    tensors = {name: torch.ones(400_000) for name in names.values()}
    save(tmp_path / "c.ckpt", tensors, {"trainer.pt": rest(names)}, ABOUT)
    write_full({"global_step": 1}, tmp_path / "out.ckpt")
    for number in range(2, 8):
        with installed(Failing(number, errno.ENOSPC)), pytest.raises(CheckpointWriteError, match="No space left"):
            consolidate(CheckpointReader(tmp_path / "c.ckpt"), tmp_path / "out.ckpt")
        assert read_full(tmp_path / "out.ckpt") == {"global_step": 1}
        assert sorted(os.listdir(tmp_path)) == ["c.ckpt", "out.ckpt"]


def test_classes_are_loaded_only_if_asked_for(run: Run, error: Run, tmp_path: Path) -> None:
    file = rest({"w": "state_dict.w"}, callbacks={"Mine": {"path": Path("x")}})
    about = {**ABOUT, "left_out": ["frozen"]}
    save(tmp_path / "c.ckpt", {"state_dict.w": torch.ones(5)}, {"trainer.pt": file}, about)
    line = error("consolidate", tmp_path / "c.ckpt", tmp_path / "out.ckpt")
    assert "pathlib.PosixPath" in line
    assert "--no-weights-only" in line
    assert not (tmp_path / "out.ckpt").exists()
    printed = run("consolidate", tmp_path / "c.ckpt", tmp_path / "out.ckpt", "--no-weights-only")
    assert "1 frozen parameters are not in it" in printed
    assert read_full(tmp_path / "out.ckpt", weights_only=False)["callbacks"]["Mine"]["path"] == Path("x")
    assert "left out: 1 frozen parameters" in run("verify", tmp_path / "c.ckpt")


class Holder:
    """Holds a tensor where only pickle finds it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def awkward(get: Callable[[str], Tensor]) -> dict[str, Any]:
    base = torch.arange(20.0)
    return {
        "state_dict": OrderedDict(weight=get("weight"), tied=get("weight"), half=get("half"), empty=get("empty")),
        "scalar": (get("scalar"), [get("bool")], {"again": get("half")}),
        "views": [base[3:5], base[::2], base.view(4, 5).t()],
        "parameter": nn.Parameter(torch.ones(3)),
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.ones(3, dtype=torch.complex64),
        "held": Holder(torch.arange(3)),
    }


def test_a_streamed_file_is_the_file_of_torch_save(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.randn(300, 10), "half": torch.arange(7, dtype=torch.bfloat16), "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64), "bool": torch.tensor([True, False]),
    }  # fmt: skip
    fakes = {name: stand_in(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    asked: list[str] = []

    def values(fake: Tensor) -> Tensor:
        (name,) = (name for name, other in fakes.items() if other is fake)
        asked.append(name)
        return tensors[name]

    written: list[int] = []
    write_streamed(awkward(fakes.__getitem__), tmp_path / "streamed.ckpt", values, written.append)
    write_full(awkward(tensors.__getitem__), tmp_path / "saved.ckpt")
    assert verify_full(tmp_path / "streamed.ckpt")
    assert asked == ["weight", "half", "scalar", "bool"]
    ours, theirs = (read_full(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("streamed", "saved"))
    for loaded in (ours, theirs):
        loaded["sparse"], loaded["held"] = loaded["sparse"].to_dense(), loaded["held"].value
    assert list(ours) == list(theirs)
    assert same(ours, theirs)
    assert ours["state_dict"]["weight"] is ours["state_dict"]["tied"]
    assert ours["views"][0].data_ptr() - ours["views"][1].data_ptr() == 12
    assert type(ours["parameter"]) is nn.Parameter
    assert sum(written) >= sum(tensor.nbytes for tensor in tensors.values())


def test_a_value_of_another_shape_and_a_bare_storage_are_refused(tmp_path: Path) -> None:
    fake = stand_in((3,), torch.float32)
    with pytest.raises(CheckpointWriteError, match=r"expected torch\.float32 of"):
        write_streamed({"w": fake}, tmp_path / "c.ckpt", lambda _: torch.ones(4))
    with pytest.raises(CheckpointWriteError, match="storages without a tensor"):
        write_streamed({"w": fake, "s": torch.ones(3).untyped_storage()}, tmp_path / "c.ckpt", lambda _: torch.ones(3))
    assert os.listdir(tmp_path) == []


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    names = {f"w{number}": f"state_dict.w{number}" for number in range(24)}
    tensors = {name: torch.full((2**20,), float(number)) for number, name in enumerate(names.values())}  # 4 MiB each
    save(tmp_path / "c.ckpt", tensors, {"trainer.pt": rest(names)}, ABOUT)
    del tensors

    def work() -> None:
        reader = CheckpointReader(tmp_path / "c.ckpt")
        consolidate(reader, tmp_path / "warm.ckpt")  # what is imported on the way is of no concern
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        consolidate(reader, tmp_path / "out.ckpt")
        (tmp_path / "peak").write_text(str(peak() - before))

    assert os.waitpid(in_child(work), 0)[1] == 0
    # of 96 MiB: a few tensors, as malloc keeps what was freed
    assert int((tmp_path / "peak").read_text()) < 32 * 2**20
    loaded = read_full(tmp_path / "out.ckpt")["state_dict"]
    assert all(torch.equal(loaded[f"w{number}"], torch.full((2**20,), float(number))) for number in range(24))


def peak() -> int:
    """The most bytes of memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# From one strategy to another


def _ddp_and_back(folder: Path) -> dict[str, Any]:
    on_ranks()
    first = fit("ddp", folder, 1)
    straight = fit("ddp", None, 2)
    assert first.losses == straight.losses[:6]
    found = {"straight": straight.losses[6:], "weights": [p.detach() for p in straight.parameters()]}
    for strategy in ({"placement": "device"}, {"placement": "host", "chunk_size": 1088}):
        module = fit(GeminiStrategy(**strategy), None, 2, folder / "last.ckpt")
        found[strategy["placement"]] = module.losses, [p.detach() for p in module.parameters()]
    fit(GeminiStrategy(state_dict_type="full"), folder / "ours", 2, folder / "last.ckpt")
    return found


def test_a_file_of_ddp_is_resumed_on_two_ranks_and_on_one(tmp_path: Path) -> None:
    ranks = run_ranks(_ddp_and_back, 2, tmp_path)
    for found in ranks:
        for placement in ("device", "host"):
            losses, weights = found[placement]
            assert losses == pytest.approx(found["straight"], rel=1e-4)
            for ours, theirs in zip(weights, found["weights"], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    alone = fit(GeminiStrategy(), None, 2, tmp_path / "last.ckpt")
    plain = fit("auto", None, 2, tmp_path / "last.ckpt")
    assert alone.losses == plain.losses
    assert same(dict(alone.named_parameters()), dict(plain.named_parameters()))
    back = fit("auto", None, 3, tmp_path / "ours" / "last.ckpt")  # and back to plain Lightning
    assert len(back.losses) == 6
    assert verify_full(tmp_path / "ours" / "last.ckpt")


def test_the_plugin_reads_shards_for_other_strategies(saved: Path) -> None:
    from lightning_gemini.checkpoint.io import GeminiCheckpointIO

    straight = fit("auto", None, 2)
    resumed = fit("auto", None, 2, saved / "sharded" / "last.ckpt", plugins=[GeminiCheckpointIO()])
    assert resumed.losses == straight.losses[6:]
    whole = whole_checkpoint(CheckpointReader(saved / "sharded" / "last.ckpt"))
    assert same(whole["optimizer_states"], read_full(saved / "plain" / "last.ckpt")["optimizer_states"])
