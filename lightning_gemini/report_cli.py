"""The subcommand `lightning-gemini report`: the memory report of a run, and one of its steps as a picture."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.timeline import FILE_NAME, Timeline
from lightning_gemini.picture import draw


def report(run: Path, out: Path | None) -> None:
    """Prints the report of the run `run` and draws its step into `out`, by default beside the step's file.

    Exits with code 1 and one line on stderr if there is no such step, or if it cannot be read or drawn.

    Args:
        run: a folder, in which the newest step is looked for at any depth, or the step's file itself.
        out: a file that ends in .png, .pdf or .svg.
    """
    try:
        path = find_step(run)
        timeline = read_step(path)
        print(f"step: {path}\n{timeline.report}")
        if not timeline.moments:
            print("nothing to draw: no chunk moved in this step")
            return
        picture = out or path.with_suffix(".png")
        draw_step(timeline, picture)
        print(f"picture: {picture}")
    except (ConfigurationError, OSError) as error:
        sys.stdout.flush()  # what was printed stands before the error
        sys.exit(f"lightning-gemini report: {error}")


def find_step(run: Path) -> Path:
    """The newest file of rank 0 in the folder `run` and below, else of another rank; `run` itself if it is a file.

    Raises:
        ConfigurationError: there is none.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise ConfigurationError(f"{run} does not exist. Give the folder of a run, or a {FILE_NAME}.")
    for pattern in (FILE_NAME, FILE_NAME.replace(".json", "-rank*.json")):
        if found := [path for path in run.rglob(pattern) if path.is_file()]:
            return max(found, key=lambda path: path.stat().st_mtime)
    raise ConfigurationError(
        f"no {FILE_NAME} in {run} or below. A training run with the gemini strategy writes one if its chunks move "
        "between host and device or between ranks; give the folder that such a run wrote to."
    )


def read_step(path: Path) -> Timeline:
    """The timeline in the file `path`.

    Raises:
        ConfigurationError: it cannot be read, or holds no timeline of this version.
    """
    try:
        return Timeline.from_json(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path}: expected the timeline of a step as JSON, but this is no text: {error}"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def draw_step(timeline: Timeline, picture: Path) -> None:
    """Draws `timeline` into the file `picture`.

    Raises:
        ConfigurationError: the file cannot be written or has another suffix, or matplotlib is missing.
    """
    try:
        draw(timeline, picture)
    except OSError as error:
        raise ConfigurationError(
            f"{picture} cannot be written: {error.strerror or error}. Give another file with --out FILE.png."
        ) from None
