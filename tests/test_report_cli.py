"""`lightning-gemini report`: which step it finds, what it prints and draws, and what it says if it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from lightning_gemini import cli
from tests.timelines import small

Report = Callable[..., str]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Runs the command in this process and returns what it printed."""

    def run(*arguments: object) -> str:
        cli.main(["report", *map(str, arguments)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Report:
    """Runs the command, which must fail, and returns its one line on stderr."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", *map(str, arguments)])
        # the interpreter prints the text that SystemExit carries, and exits with 1
        assert isinstance(stop.value.code, str)
        assert "\n" not in stop.value.code
        assert capsys.readouterr().err == ""
        return stop.value.code

    return run


def write(path: Path, text: str | None = None, age: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(small().to_json() if text is None else text)
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


# What it does


def test_the_report_is_printed_and_the_step_drawn_beside_its_file(report: Report, tmp_path: Path) -> None:
    step = write(tmp_path / "version_0" / "gemini_step.json")
    picture = step.with_suffix(".png")
    assert report(tmp_path) == f"step: {step}\n4 chunks\nand the rest\npicture: {picture}\n"
    assert imread(picture).shape[1] == 2000


def test_the_newest_step_is_taken(report: Report, tmp_path: Path) -> None:
    write(tmp_path / "gemini_step.json", age=10)
    newest = write(tmp_path / "a" / "b" / "gemini_step.json")
    write(tmp_path / "z" / "gemini_step.json", age=20)
    (tmp_path / "zz" / "gemini_step.json").mkdir(parents=True)
    assert report(tmp_path).startswith(f"step: {newest}\n")


def test_rank_0_comes_first_and_other_ranks_do_if_they_are_alone(report: Report, tmp_path: Path) -> None:
    other = write(tmp_path / "gemini_step-rank12.json")
    assert report(tmp_path).startswith(f"step: {other}\n")
    assert other.with_suffix(".png").exists()
    first = write(tmp_path / "gemini_step.json", age=100)
    assert report(tmp_path).startswith(f"step: {first}\n")


def test_the_file_itself_can_be_given_under_any_name(report: Report, tmp_path: Path) -> None:
    step = write(tmp_path / "kept.json")
    out = tmp_path / "paper.pdf"
    assert report(step, "--out", out).splitlines()[-1] == f"picture: {out}"
    assert out.read_bytes().startswith(b"%PDF")
    assert not step.with_suffix(".png").exists()


def test_a_step_in_which_nothing_moved_is_reported_only(report: Report, tmp_path: Path) -> None:
    step = write(tmp_path / "gemini_step.json", replace(small(), moments=()).to_json())
    assert report(tmp_path).splitlines()[1:] == [
        "4 chunks",
        "and the rest",
        "nothing to draw: no chunk moved in this step",
    ]
    assert list(tmp_path.iterdir()) == [step]


def test_help_imports_neither_torch_nor_lightning() -> None:
    # by path: what the package itself imports is not this module's affair
    script = f"""
import runpy, sys
try:
    runpy.run_path({cli.__file__!r})["main"](["report", "--help"])
finally:
    print(*sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("usage: lightning-gemini report [-h] [--out FILE.png] RUN_DIR")
    assert not {"torch", "lightning", "matplotlib"} & set(out.splitlines()[-1].split())


def test_the_help_of_the_whole_command_mentions_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-gemini"])  # LightningCLI warns of arguments that it is not to read
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "lightning-gemini report RUN_DIR" in " ".join(capsys.readouterr().out.split())


# What it says if it cannot


def test_the_process_fails_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_gemini.cli", "report", str(tmp_path / "none")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        f"lightning-gemini report: {tmp_path / 'none'} does not exist. "
        "Give the folder of a run, or a gemini_step.json.\n"
    )


def test_a_folder_without_a_step(error: Report, tmp_path: Path) -> None:
    write(tmp_path / "other.json")
    assert error(tmp_path) == (
        f"lightning-gemini report: no gemini_step.json in {tmp_path} or below. A training run with the gemini strategy "
        "writes one if its chunks move between host and device or between ranks; give the folder that such a run "
        "wrote to."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected the timeline of a step as JSON, but it does not parse"),
        (b"\xff\xfe\x00", "expected the timeline of a step as JSON, but this is no text"),
        (b'{"format": 9}', "in format 2, got format 9"),
        (b'{"format": 2}', "the timeline lacks the field(s) kind"),
    ],
)
def test_a_file_that_is_broken_or_newer(error: Report, tmp_path: Path, content: bytes, message: str) -> None:
    step = tmp_path / "gemini_step.json"
    step.write_bytes(content)
    said = error(tmp_path)
    assert said.startswith(f"lightning-gemini report: {step}: ")
    assert message in said


def test_a_file_that_cannot_be_read(error: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = write(tmp_path / "gemini_step.json")

    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)  # tests may run as root, whom no mode stops
    assert error(step) == f"lightning-gemini report: {step} cannot be read: Permission denied."


def test_a_missing_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "gemini_step.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"needs matplotlib: pip install 'lightning-gemini\[report\]'"):
        cli.main(["report", str(tmp_path)])
    assert "and the rest" in capsys.readouterr().out, "the report itself needs no matplotlib"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("no/such/step.png", "cannot be written: No such file or directory. Give another file with --out FILE.png."),
        ("gemini_step.json/step.png", "cannot be written: Not a directory. Give another"),
        ("folder.png", "cannot be written: Is a directory. Give another"),
        ("step.bmp", "the picture's file must end in .png, .pdf, .svg, got 'step.bmp'"),
        ("folder", "the picture's file must end in .png, .pdf, .svg, got 'folder'"),
    ],
)
def test_a_picture_that_cannot_be_written(error: Report, tmp_path: Path, out: str, message: str) -> None:
    write(tmp_path / "gemini_step.json")
    (tmp_path / "folder.png").mkdir()
    assert message in error(tmp_path, "--out", tmp_path / out)


def test_a_folder_that_is_not_writable(error: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "gemini_step.json")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", refuse)
    assert error(tmp_path) == (
        f"lightning-gemini report: {tmp_path / 'gemini_step.png'} cannot be written: Permission denied. "
        "Give another file with --out FILE.png."
    )
