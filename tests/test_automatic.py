"""Which checkpoint a run goes on from when nobody has named a certain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_gemini.checkpoint.automatic import choose
from lightning_gemini.checkpoint.manifest import MANIFEST_NAME
from lightning_gemini.checkpoint.writer import save
from lightning_gemini.core.errors import CorruptCheckpointError, NotACheckpointError


def alone(value: object) -> list[object]:
    return [value]


def saved(folder: Path, *names: str) -> list[Path]:
    for name in names:
        save(folder / name, {"a": torch.ones(3)}, {}, {})
    return [folder / name for name in names]


def damage(path: Path) -> None:
    (file,) = path.rglob("rank0.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_certain_one_is_taken_as_it_is(tmp_path: Path) -> None:
    _, newer = saved(tmp_path, "a.ckpt", "b.ckpt")
    damage(newer)
    assert choose(newer, set(), 0, alone) == str(newer), "reading it says what is wrong"
    with pytest.raises(NotACheckpointError, match="nothing at"):
        choose(tmp_path / "c.ckpt", set(), 0, alone)


def test_the_folder_of_a_run_stands_for_the_newest_that_is_whole(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, "a.ckpt", "b.ckpt")
    assert choose(tmp_path, set(), 0, alone) == str(newer)
    damage(newer)
    with pytest.warns(UserWarning, match=r"newer ones are broken(.|\n)*b\.ckpt"):
        assert choose(tmp_path, set(), 0, alone) == str(older)
    damage(older)
    with pytest.raises(CorruptCheckpointError, match="none that is whole"):
        choose(tmp_path, set(), 0, alone)


@pytest.mark.parametrize("how", ["damaged", "unfinished"])
def test_the_last_one_has_to_be_whole(how: str, tmp_path: Path) -> None:
    older, newer = saved(tmp_path, "a.ckpt", "b.ckpt")
    last = tmp_path / "last.ckpt"
    last.symlink_to(newer.name)
    assert choose(last, {last}, 0, alone) == str(last)
    if how == "damaged":
        damage(newer)
    else:
        (newer / MANIFEST_NAME).unlink()
    with pytest.warns(UserWarning, match="going on from .*a.ckpt instead"):
        assert choose(last, {str(last)}, 0, alone) == str(older)
