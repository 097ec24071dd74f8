"""The `lightning-gemini` command; imports only what it needs."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from importlib.metadata import version
from pathlib import Path


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`, by default the process's own, without the program's name."""
    arguments = sys.argv[1:] if args is None else args
    if arguments[:1] == ["--version"]:
        print(f"lightning-gemini {version('lightning-gemini')}")
    elif arguments[:1] == ["report"]:
        settings = _report_parser().parse_args(arguments[1:])
        from lightning_gemini.report_cli import report  # not needed for the help

        report(settings.run_dir, settings.out)
    else:
        from lightning_gemini.lightning_cli import GeminiCLI  # an import of seconds

        GeminiCLI(args)


def _report_parser() -> ArgumentParser:
    parser = ArgumentParser(
        "lightning-gemini report",
        description="Print the memory report of a run, and draw one of its steps: device memory against the budget, "
        "where each chunk is, copies and waits. Reads the newest gemini_step.json.",
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run, searched at any depth, or the file itself"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.png", help="the picture, also .pdf or .svg (default: beside the step's file)"
    )
    return parser


if __name__ == "__main__":
    main()
