"""The `lightning-gemini` command; imports only what it needs."""

from __future__ import annotations

import sys
from importlib.metadata import version


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`, by default the process's own, without the program's name."""
    arguments = sys.argv[1:] if args is None else args
    if arguments[:1] == ["--version"]:
        print(f"lightning-gemini {version('lightning-gemini')}")
    else:
        from lightning_gemini.lightning_cli import GeminiCLI  # an import of seconds

        GeminiCLI(args)


if __name__ == "__main__":
    main()
